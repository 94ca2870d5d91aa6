"""Contract: on a GPU too every baseline of the benchmarks does the work that it stands for: noise from the seed alone,
taken back by `restore`, and the update adds the noise of the perturbations."""

import pytest
import torch

from bench.common import baselines


@pytest.mark.parametrize("name", baselines.BASELINES)
def test_a_baseline_does_the_work_on_a_gpu(name):
    baseline, make = (
        baselines.BASELINES[name],
        lambda: {"matrix": torch.zeros(300, 200, device="cuda"), "vector": torch.zeros(5001, device="cuda")},
    )
    one, two, both = make(), make(), make()
    baseline.perturb(one, 5, 0.5)
    baseline.perturb(two, 6, 0.5)
    baseline.update(both, [5, 6], [0.5, -0.25])
    for key in one:
        n = one[key].numel()
        assert abs(one[key].mean()) < 5 * 0.5 / n**0.5 and abs(one[key].std() / 0.5 - 1) < 5 / (2 * n) ** 0.5
        assert abs(torch.corrcoef(torch.stack([one[key].flatten(), two[key].flatten()]))[0, 1]) < 5 / n**0.5
        torch.testing.assert_close(both[key], one[key] - 0.5 * two[key], rtol=0, atol=1e-5)
    baseline.restore(one, 5, 0.5)
    assert max(w.abs().max() for w in one.values()) < 1e-6
