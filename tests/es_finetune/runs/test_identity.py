"""Contract under test: a task is known by its questions, by what its items give the reward, and by its
reward's code."""

import copy
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from es_finetune.runs.identity import canonical, task_identity
from es_finetune.tasks import Item


@pytest.mark.parametrize(
    "one, other",
    [
        (np.int64(3), np.int64(4)),
        (np.array([1.5]), np.array([2.5])),
        (torch.tensor([1]), torch.tensor([2])),
        (Decimal(1), Decimal(2)),
        ({"a": 1}, {"a": 2}),
        ({1, 2}, {1, 3}),
    ],
    ids=repr,
)
def test_reference_answers_of_any_kind_are_told_apart(one, other):
    assert canonical([one]) == canonical([copy.deepcopy(one)]) != canonical([other])


def test_the_order_of_a_dict_is_not_told():
    assert canonical({"a": 1, "b": 2}) == canonical({"b": 2, "a": 1})


def test_what_differs_is_told_by_its_part():
    def identity(question="1 + 1", answer=2, code="f00d"):
        train = [Item("a", "a", {"answer": 0})]
        return task_identity(
            SimpleNamespace(
                metric="exact", train=train, test=[Item(question, question, {"answer": answer})], code_digest=code
            )
        )

    for changes, parts in (
        ({}, set()),
        ({"question": "1 + 2"}, {"test_items"}),
        ({"answer": 3}, {"test_scoring"}),
        ({"code": None}, {"reward"}),
    ):
        assert {part for part, value in identity(**changes).items() if value != identity()[part]} == parts
