"""Contract: the Python of README.md runs as it stands, for float32 and bfloat16 weights alike, and does what its
comments say.

The example with a Trainer needs a model on disk: tests/es_finetune/test_trainer.py runs it.
"""

import pathlib
import re
from unittest.mock import MagicMock, create_autospec

import pytest
import torch

import es_finetune
import es_kernels

BLOCKS = re.findall(r"```python\n(.*?)```", (pathlib.Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)


@pytest.fixture(params=(torch.float32, torch.bfloat16), ids=str)
def model(request):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5)).to(request.param)


def the_block_with(words):
    (block,) = (block for block in BLOCKS if words in block)
    return compile(block, "README.md", "exec")


def test_there_are_four_blocks():
    assert len(BLOCKS) == 4  # one more wants a test of its own


def test_the_commands_block(monkeypatch):
    """That the functions take these arguments; what they do with them, tests/es_finetune/commands tests."""
    functions = {
        name: create_autospec(getattr(es_finetune, name)) for name in ("evaluate", "export", "replay", "calibrate")
    }
    for name, function in functions.items():
        function.return_value = MagicMock()
        monkeypatch.setattr(es_finetune, name, function)
    exec(the_block_with("es_finetune.evaluate"), {})
    assert all(function.called for function in functions.values())


def test_the_kernels_block(model, monkeypatch):
    live, seen, add_noise_ = dict(model.named_parameters()), [], es_kernels.add_noise_
    before = es_kernels.fingerprint(live)

    def watched(*args, **kwargs):
        add_noise_(*args, **kwargs)
        seen.append(es_kernels.fingerprint(live) == before)

    monkeypatch.setattr(es_kernels, "add_noise_", watched)
    exec(
        the_block_with("add_noise_"),
        names := {"model": model, "seed": 1, "sigma": 0.1, "seeds": [1, 2], "coefs": [0.1, -0.1]},
    )
    assert seen == [False, True, True], "perturbed; restored exactly; the update is in the master"
    assert not any(torch.equal(p, exact) for p, exact in zip(live.values(), names["master"].values(), strict=True))
    weight = live["0.weight"]
    weight.data = weight.data.clone()
    with pytest.raises(RuntimeError, match="'0.weight' moved"), torch.no_grad():
        add_noise_(names["table"], 1, 0.1)


def test_the_optimizers_block(model):
    before = es_kernels.fingerprint(model.named_parameters())
    rewards = iter(range(2 * 30))
    exec(
        the_block_with("optimizer.step"),
        names := {"model": model, "generations": 2, "reward_of": lambda model: float(next(rewards))},
    )
    assert names["mean_reward"] == 30 + 29 / 2 and es_kernels.fingerprint(model.named_parameters()) != before
