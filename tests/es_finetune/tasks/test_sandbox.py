"""Contract under test: what the child's side of a reward makes of functions, values and exceptions
(es_finetune.tasks.sandbox).

- Equal code has equal digests wherever it lies, and the ones it has always had: a run that was begun before goes on.
- A reward is a finite number or a dict of them; the rest is told from a number that is wrong.
- No module beside the script stands in for one that a reward imports.
"""

import math
import sys
from fractions import Fraction
from pathlib import Path

import numpy
import pytest
import torch

from es_finetune.optim import shaping
from es_finetune.tasks import sandbox
from es_finetune.tasks.reward_process import RewardProcess
from es_finetune.tasks.sandbox import RewardTypeError, finite_number, one_line, score_parts

# --- the code of a function -------------------------------------------------------------------------------------------


def put(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def code(target):
    process = RewardProcess(str(target), 5.0)
    process.close()
    return process.attributes["code"]


F = "import neighbour\nimport pytest\ndef f(completion, item):\n    return 1\ndef g(completion, item):\n    return 1\n"


def test_equal_code_has_equal_digests_wherever_it_lies(tmp_path, monkeypatch):
    first = put(tmp_path / "a", reward=F, neighbour="N = 1\n", stranger="")
    second = put(tmp_path / "b", moved=F, neighbour="N = 1\n", stranger="X = 3\n")
    digest = code(f"{first}/reward.py:f")
    assert digest == "9a0f8cfc3cff16c5"  # a run that was begun before has recorded such digits
    assert code(f"{second}/moved.py:f") == digest
    monkeypatch.syspath_prepend(second)
    assert code("moved:f") == digest
    assert code(f"{first}/reward.py:g") != digest
    put(first, neighbour="N = 2\n")
    assert code(f"{first}/reward.py:f") != digest
    put(first, neighbour="N = 1\n", reward=F + "\n")
    assert code(f"{first}/reward.py:f") != digest


def test_a_module_in_a_package_has_its_package_for_neighbours(tmp_path, monkeypatch):
    put(tmp_path / "pack", __init__="", helper="N = 1\n")
    put(
        tmp_path / "pack" / "sub",
        __init__="",
        reward="from pack import helper\ndef f(completion, item):\n    return 1\n",
    )
    monkeypatch.syspath_prepend(tmp_path)
    digest = code("pack.sub.reward:f")
    put(tmp_path / "pack", helper="N = 2\n")
    assert code("pack.sub.reward:f") != digest


# --- what counts as a reward ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [2, 2.0, numpy.float32(2), numpy.int64(2), torch.tensor(2.0), torch.tensor([2]), Fraction(2)], ids=repr
)
def test_numbers_are_rewards(value):
    assert score_parts(value) == (2.0, None, None) and type(score_parts(value)[0]) is float


def test_parts_of_a_reward():
    assert score_parts(True) == (1.0, None, None) and score_parts(numpy.bool_(False)) == (0.0, None, None)
    assert score_parts({"reward": -3, "exact": True}) == (-3.0, 1.0, None)
    assert score_parts({"reward": -3, "format": 0.5, "exact": None}) == (-3.0, None, 0.5)


@pytest.mark.parametrize(
    "value",
    [
        None,
        "1",
        b"1",
        [1],
        (1.0,),
        1j,
        pytest.param(object(), id="object()"),
        torch.ones(2),
        {},
        {"exact": 1},
        {"reward": 1, "other": 2},
        {"reward": "1"},
        {1: 2},
    ],
    ids=repr,
)
def test_what_is_no_reward(value):
    with pytest.raises(RewardTypeError):
        score_parts(value)


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        -math.inf,
        10**400,
        {"reward": 1, "exact": 1.5},
        {"reward": 1, "format": -0.1},
        {"reward": math.nan},
    ],
)
def test_bad_numbers(value):
    with pytest.raises(ValueError) as raised:
        score_parts(value)
    assert not isinstance(raised.value, RewardTypeError)


def test_one_line_survives_hostile_exceptions():
    class Hostile(Exception):
        def __str__(self):
            raise RuntimeError

    assert one_line(Hostile()) == "Hostile"
    assert len(one_line(ValueError("x\n" * 10_000))) < 300
    with pytest.raises(RewardTypeError, match="the reward is None, not a number"):
        finite_number(None, "the reward")


def test_the_optimizer_takes_every_reward():
    assert sandbox.MAX_REWARD == shaping.MAX_REWARD


# --- imports ----------------------------------------------------------------------------------------------------------


def test_no_module_beside_the_script_stands_in_for_another():
    names = {path.stem for path in Path(sandbox.__file__).parent.rglob("*.py")}
    assert not names & (set(sys.stdlib_module_names) | {"datasets", "math_verify", "reasoning_gym", "sympy"})
