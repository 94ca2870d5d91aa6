"""Contract: every baseline does the work that it stands for. Its perturbation is N(0, sigma^2) noise in every tensor,
from the seed alone; `restore` takes it back up to rounding; its update adds the very noise of the perturbations, each
with its coefficient. What it holds in between is what is counted for it."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.common import baselines


def weights(dtype):
    return {"matrix": torch.zeros(300, 200, dtype=dtype), "vector": torch.zeros(5001, dtype=dtype)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name, baseline in baselines.BASELINES.items() if baseline.only_on is None])
def test_a_baseline_does_the_work(name, dtype):
    baseline, rounding = baselines.BASELINES[name], 2.0**-7 if dtype == torch.bfloat16 else 2.0**-22
    one, two, again = weights(dtype), weights(dtype), weights(dtype)
    baseline.perturb(one, 5, 0.5)
    baseline.perturb(two, 6, 0.5)
    baseline.perturb(again, 5, 0.5)
    for key in one:
        assert torch.equal(one[key], again[key])
        assert abs(one[key].float().mean()) < 5 * 0.5 / one[key].numel() ** 0.5
        assert abs(one[key].float().std() / 0.5 - 1) < 5 / (2 * one[key].numel()) ** 0.5
        assert (
            abs(torch.corrcoef(torch.stack([one[key].float().flatten(), two[key].float().flatten()]))[0, 1])
            < 5 / one[key].numel() ** 0.5
        )
    baseline.restore(again, 5, 0.5)
    assert max(w.abs().max() for w in again.values()) <= 4 * rounding
    baseline.update(again := weights(dtype), [5, 6], [0.5, -0.25])
    for key in one:
        torch.testing.assert_close(
            again[key].float(), one[key].float() - 0.5 * two[key].float(), rtol=0, atol=8 * rounding
        )


class Held(TorchDispatchMode):
    """The most bytes that tensors made under it hold at once; views hold none of their own."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        for tensor in made if isinstance(made, (list, tuple)) else [made]:
            if not isinstance(tensor, torch.Tensor) or any(
                tensor is a for a in torch.utils._pytree.tree_leaves(arguments)
            ):
                continue
            key, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
            if key not in self.known and key not in self.mine(arguments):
                self.known.add(key)
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(tensor, self.freed, key, size)
        return made

    def mine(self, arguments):
        return {
            a.untyped_storage().data_ptr()
            for a in torch.utils._pytree.tree_leaves(arguments)
            if isinstance(a, torch.Tensor)
        }

    def freed(self, key, size):
        self.known.discard(key)
        self.now -= size


# What is compiled shows no operation here; Triton's has no temporaries, and its kernels run on a GPU.
@pytest.mark.parametrize(
    "name",
    [name for name, b in baselines.BASELINES.items() if b.only_on is None and name != "torch.compile"],
)
def test_what_a_baseline_holds_is_what_is_counted_for_it(name):
    """On a CPU the same operations as on a GPU."""
    baseline, params = (
        baselines.BASELINES[name],
        {f"w{n}": torch.zeros(n, dtype=torch.bfloat16) for n in (100_000, 300_000, 200_000)},
    )
    sizes = [p.numel() for p in params.values()]
    for run, counted in (
        (lambda: baseline.perturb(params, 1, 0.1), baseline.member_bytes),
        (lambda: baseline.update(params, [1, 2, 3], [0.1] * 3), baseline.update_bytes),
    ):
        with Held() as held:
            run()
        assert held.most == counted(sizes)


def test_triton_is_left_out_on_a_cpu():
    assert "Triton tl.randn" in baselines.BASELINES and "Triton tl.randn" not in baselines.available("cpu")
