"""Contract under test: patterns of names decide what is tuned, and with which sigma; one that fits nothing, or only a
part of what is one parameter in memory, is refused by name."""

import pytest
import torch

from es_finetune.errors import UserError
from es_finetune.runs.groups import param_groups
from es_kernels import NamedTensor, Segment


@pytest.fixture
def entries():
    frozen = torch.nn.Parameter(torch.zeros(4), requires_grad=False)
    fused = [Segment("up", 0, 2), Segment("down", 2, 2, offset=2)]
    return [
        NamedTensor("embed", torch.nn.Parameter(torch.zeros(4))),
        NamedTensor("norm", torch.nn.Parameter(torch.zeros(4))),
        NamedTensor("experts", torch.nn.Parameter(torch.zeros(4)), fused),
        NamedTensor("tower", frozen),
    ]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, {0.1: ["embed", "norm", "experts"]}),
        ({"tune": ["*norm", "embed"]}, {0.1: ["embed", "norm"]}),
        ({"tune": ["*"], "freeze": ["e*"]}, {0.1: ["norm"]}),
        ({"sigma_for": [("norm", 0.5), ("n*", 0.7), ("*", 0.2)]}, {0.2: ["embed", "experts"], 0.5: ["norm"]}),
        ({"freeze": ["experts"]}, {0.1: ["embed", "norm"]}),
        ({"freeze": ["[ud]*"]}, {0.1: ["embed", "norm"]}),
    ],
    ids=str,
)
def test_patterns_make_groups(entries, options, expected):
    groups = param_groups(entries, 0.1, **options)
    assert {group["sigma"]: [entry.name for entry in group["params"]] for group in groups} == expected
    assert all(group["initial_sigma"] == group["sigma"] for group in groups)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"freeze": ["nothing*"]}, "'nothing\\*' fits no parameter that requires grad; names are like 'experts'"),
        ({"tune": ["tower"]}, "'tower' fits no parameter that requires grad"),
        ({"sigma_for": [("embed", 0.5), ("embde", 0.7)]}, "'embde' fits no parameter"),
        ({"tune": ["up"]}, "'up' fits 'up' but not 'down', which are one parameter in memory, 'experts'"),
        ({"tune": ["norm"], "freeze": ["*"]}, "leave no parameter to tune"),
    ],
    ids=str,
)
def test_patterns_that_cannot_be_meant_are_refused(entries, options, words):
    with pytest.raises(UserError, match=words):
        param_groups(entries, 0.1, **options)
