"""Contract under test: what a user can mend is told from a bug by its type, wherever it comes from."""

import pytest
import torch

import es_kernels
from es_finetune import EvolutionStrategy
from es_finetune.engines.prompts import PromptError
from es_finetune.errors import RewardFailed, RunError, RunStopped, UserError, WorkersDiffer, did_you_mean, is_foreseen
from es_finetune.evaluation.evaluator import Unaskable
from es_finetune.models.load import pick_device


def test_the_types():
    for kind in (PromptError, Unaskable):
        assert issubclass(kind, UserError)
    for kind in (RewardFailed, WorkersDiffer, RunStopped):
        assert issubclass(kind, RunError)
    full = torch.OutOfMemoryError("CUDA out of memory"), MemoryError()
    for error in (UserError("x"), RewardFailed("x"), FileNotFoundError(2, "x", "y"), KeyboardInterrupt(), *full):
        assert is_foreseen(error)
    for error in (ValueError("x"), TypeError("x"), RuntimeError("x"), KeyError("x"), AssertionError()):
        assert not is_foreseen(error)


def test_what_the_kernels_refuse_of_a_users_weights_is_the_users(monkeypatch):
    memory = torch.zeros(6)
    overlapping = [("a", torch.nn.Parameter(memory[:4])), ("b", torch.nn.Parameter(memory[2:]))]
    with pytest.raises(ValueError, match="overlap in memory") as of_the_kernels:
        es_kernels.ParamTable(overlapping)
    with pytest.raises(UserError) as of_the_optimizer:
        EvolutionStrategy(overlapping)
    assert str(of_the_optimizer.value) == str(of_the_kernels.value)
    monkeypatch.setenv("ES_KERNELS_BACKEND", "abacus")
    with pytest.raises(UserError, match="ES_KERNELS_BACKEND: there is no backend .abacus"):
        pick_device("cpu")


@pytest.mark.parametrize(
    "word, meant",
    [
        ("sgima", ": did you mean --sigma?"),
        ("Batch-Size", ": did you mean --batch_size?"),
        ("eval", ": did you mean --eval_every or --eval_items?"),
        ("zebra", ""),
    ],
)
def test_what_was_meant(word, meant):
    assert did_you_mean(word, ["sigma", "batch_size", "eval_every", "eval_items"], "--") == meant
