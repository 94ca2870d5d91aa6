"""Contract: every Python block of the documentation compiles, and what it takes from es_kernels and es_finetune exists.
Blocks run as they stand and do what their comments say; what needs a model on disk or a hub, other tests run:
test_trainer.py the example with a Trainer, tests/es_kernels/test_noise.py NOISE.md's."""

import ast
import importlib
from unittest.mock import MagicMock, create_autospec

import pytest
import torch

import es_finetune
import es_kernels

RUN_HERE = {
    "README.md",
    "docs/guides/coming-from.md",
    "docs/guides/kernels.md",
    "docs/guides/lora.md",
    "docs/guides/own-task.md",
    "docs/guides/resume.md",
    "docs/guides/models.md",
}


@pytest.fixture
def python(blocks):
    """python(page, words) -> the code of the page's blocks that hold the words."""

    def code(page, words=""):
        found = [b.text for b in blocks if (b.page, b.language) == (page, "python") and words in b.text]
        assert found, f"{page}: no block with {words!r}"
        return [compile(text, page, "exec") for text in found]

    return code


@pytest.fixture(params=(torch.float32, torch.bfloat16), ids=str)
def model(request):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5)).to(request.param)


def test_every_page_with_python_is_run(blocks):
    assert {block.page for block in blocks if block.language == "python"} == RUN_HERE | {"es_kernels/NOISE.md"}


def test_every_name_is_there(blocks):
    missing = []
    for block in blocks:
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in ("es_kernels", "es_finetune"):
                module = importlib.import_module(node.module)
                missing += [f"{node.module}.{a.name}" for a in node.names if not hasattr(module, a.name)]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module = {"es_kernels": es_kernels, "es_finetune": es_finetune}.get(node.value.id)
                if module is not None and not hasattr(module, node.attr):
                    missing.append(f"{node.value.id}.{node.attr}")
    assert missing == []


def test_the_commands_block(python, monkeypatch):
    """That the functions take these arguments; what they do with them, tests/es_finetune/commands tests."""
    functions = {
        name: create_autospec(getattr(es_finetune, name)) for name in ("evaluate", "export", "replay", "calibrate")
    }
    for name, function in functions.items():
        function.return_value = MagicMock()
        monkeypatch.setattr(es_finetune, name, function)
    (code,) = python("docs/guides/resume.md")
    exec(code, {})
    assert all(function.called for function in functions.values())


@pytest.mark.parametrize("page", ("README.md", "docs/guides/kernels.md"))
def test_the_kernels_block(page, python, model, monkeypatch):
    live, seen, add_noise_ = dict(model.named_parameters()), [], es_kernels.add_noise_
    before = es_kernels.fingerprint(live)

    def watched(*args, **kwargs):
        add_noise_(*args, **kwargs)
        seen.append(es_kernels.fingerprint(live) == before)

    monkeypatch.setattr(es_kernels, "add_noise_", watched)
    (code,) = python(page, "add_noise_")
    exec(code, names := {"model": model, "seed": 1, "sigma": 0.1, "seeds": [1, 2], "coefs": [0.1, -0.1]})
    told = "perturbed; restored exactly; the update is in the master; the model takes it"
    assert seen == [False, True, True, False], told
    pairs = zip(live.values(), names["master"].values(), strict=True)
    assert all(torch.equal(p, exact.to(p.dtype)) for p, exact in pairs)
    weight = live["0.weight"]
    weight.data = weight.data.clone()
    with pytest.raises(RuntimeError, match="'0.weight' moved"), torch.no_grad():
        add_noise_(names["table"], 1, 0.1)


def test_the_optimizers_block(python, model):
    before = es_kernels.fingerprint(model.named_parameters())
    rewards = iter(range(2 * 30))
    (code,) = python("docs/guides/kernels.md", "optimizer.step")
    exec(code, names := {"model": model, "generations": 2, "reward_of": lambda model: float(next(rewards))})
    assert names["mean_reward"] == 30 + 29 / 2 and es_kernels.fingerprint(model.named_parameters()) != before


def test_the_gguf_block(python, monkeypatch):
    from es_finetune.models import load, save

    monkeypatch.setattr(load, "load_model", create_autospec(load.load_model, return_value=(1, 2, 3)))
    monkeypatch.setattr(save, "save_model", create_autospec(save.save_model))
    (code,) = python("docs/guides/models.md")
    exec(code, {})
    assert save.save_model.call_args.args[:2] == (1, 2)


def test_the_groups_block(python):
    (code,) = python("docs/guides/lora.md")
    model = torch.nn.ModuleDict({"linear": torch.nn.Linear(3, 5), "norm": torch.nn.LayerNorm(5)})
    exec(code, names := {"model": model})
    assert [group["sigma"] for group in names["optimizer"].param_groups] == [1e-3, 1e-2]


def test_the_rewards(python):
    for code in python("docs/guides/own-task.md", "def reward"):
        if "Trainer" in code.co_names:
            continue
        exec(code, names := {})
        right, wrong = (names["reward"](text, {"answer": "8"}) for text in ("8", "no"))
        assert (right, wrong) == (1.0, 0.0) or (right["reward"], wrong["reward"]) == (1.1, 0.0)


def test_the_callback(python):
    (code,) = python("docs/guides/own-task.md", "Callback")
    exec(code, names := {})
    trainer = MagicMock()
    names["StopAt"]().on_eval(trainer, {"reward": 0.0})
    assert trainer.stop.called


def test_before_and_after(blocks, python, model):
    """What is told to those who come from another package: both sides run; ours restores exactly, and updates."""
    page = "docs/guides/coming-from.md"
    assert all(len(b.text.splitlines()) < 15 for b in blocks if b.page == page)
    seen = []

    def reward_of(model):
        seen.append(es_kernels.fingerprint(model.named_parameters()))
        return float(model[0].weight.detach().float().sum())

    given = {"torch": torch, "es_kernels": es_kernels, "model": model, "seed": 7, "sigma": 0.01, "eps": 0.02, "lr": 0.1}
    given |= {"reward_of": reward_of, "loss_of": reward_of}
    with torch.no_grad():
        given |= {"m": 5, "n": 3, "x": torch.ones(64, 2, 3), "weight": torch.ones(5, 3), "coefs": [0.01] * 64}
    at_scale, ours, mezo, our_mezo, factors = python(page)
    before = es_kernels.fingerprint(model.named_parameters())
    exec(ours, dict(given))
    assert es_kernels.fingerprint(model.named_parameters()) == before != seen[-1]
    exec(our_mezo, dict(given))
    assert es_kernels.fingerprint(model.named_parameters()) != before and len(set(seen)) == 3
    for code in (at_scale, mezo):
        exec(code, dict(given))
    exec(factors, names := dict(given))
    assert names["y"].shape == (64, 2, 5) and not torch.equal(names["weight"], torch.ones(5, 3))
    # Each member's answers are those of its perturbed weights.
    perturbed = es_kernels.add_noise_(torch.ones(5, 3), 3, 0.01, name="weight", noise_rank=1)
    torch.testing.assert_close(
        names["x"][3] @ perturbed.T,
        (
            names["x"] @ torch.ones(3, 5)
            + names["sigma"] * (names["x"] @ names["right"]) @ names["left"].transpose(1, 2)
        )[3],
    )
