"""Contract: every rival does the work that it stands for. Its perturbation is N(0, sigma^2) noise in every tensor, from the seed alone;
`restore` takes it back up to rounding; its update adds the very noise of the perturbations, each with its coefficient."""

import pathlib
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "bench"))
import rivals


def weights(dtype):
    return {"matrix": torch.zeros(300, 200, dtype=dtype), "vector": torch.zeros(5001, dtype=dtype)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name, rival in rivals.RIVALS.items() if rival.only_on is None])
def test_a_rival_does_the_work(name, dtype):
    rival, rounding = rivals.RIVALS[name], 2.0**-7 if dtype == torch.bfloat16 else 2.0**-22
    one, two, again = weights(dtype), weights(dtype), weights(dtype)
    rival.perturb(one, 5, 0.5)
    rival.perturb(two, 6, 0.5)
    rival.perturb(again, 5, 0.5)
    for key in one:
        assert torch.equal(one[key], again[key])
        assert abs(one[key].float().mean()) < 5 * 0.5 / one[key].numel() ** 0.5
        assert abs(one[key].float().std() / 0.5 - 1) < 5 / (2 * one[key].numel()) ** 0.5
        assert abs(torch.corrcoef(torch.stack([one[key].float().flatten(), two[key].float().flatten()]))[0, 1]) < 5 / one[key].numel() ** 0.5
    rival.restore(again, 5, 0.5)
    assert max(w.abs().max() for w in again.values()) <= 4 * rounding
    rival.update(again := weights(dtype), [5, 6], [0.5, -0.25])
    for key in one:
        torch.testing.assert_close(again[key].float(), one[key].float() - 0.5 * two[key].float(), rtol=0, atol=8 * rounding)


def test_triton_is_left_out_on_a_cpu():
    assert "Triton tl.randn" in rivals.RIVALS and "Triton tl.randn" not in rivals.available("cpu")
