"""Contract under test: patterns of names decide what is tuned, and with which sigma; one that fits nothing, or only a
part of what is one parameter in memory, is refused by name."""

import re

import pytest
import torch

from es_finetune.errors import UserError
from es_finetune.models.checkpoint_names import named_segments
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
        # "norm" and "embed" are never the first to fit, and used all the same
        ({"tune": ["*", "norm"], "freeze": ["e*", "embed"]}, {0.1: ["norm"]}),
        ({"shared": ["embed", "other"]}, {0.1: ["embed"]}),
        ({"shared": {"embed"}, "tune": ["e*"], "freeze": ["experts"]}, {0.1: ["embed"]}),
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
        (
            {"shared": {"embed"}, "tune": ["embed", "n*"]},
            "'n\\*' asks for 'norm', in which members that share a batch .* --members_at_once 1",
        ),
        ({"shared": {"embed"}, "sigma_for": [("norm", 0.5)]}, "'norm' asks for 'norm'"),
        ({"shared": set()}, "leave no parameter to tune"),
        ({"freeze": ["nothing*"]}, "'nothing\\*' fits no parameter that requires grad; names are like 'experts'"),
        ({"tune": ["embed", "nor"]}, "'nor' fits no parameter"),
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


@pytest.mark.parametrize("option", ["tune", "freeze", "sigma_for"])
def test_a_pattern_of_some_experts_of_a_mixture_is_refused(tiny_mixtral, option):
    entries = list(named_segments(tiny_mixtral))

    def make(pattern):
        return param_groups(entries, 0.1, **{option: [(pattern, 0.2) if option == "sigma_for" else pattern]})

    for pattern, part, other, whole in (
        ("*experts.0.*", "experts.0.w1", "experts.1.w1", "mlp.experts.gate_up_proj"),
        ("*layers.1.*.w3.weight", "experts.0.w3", "experts.0.w1", "layers.1.mlp.experts.gate_up_proj"),
    ):
        said = f".*{part}.*but not.*{other}.*one parameter in memory.*{whole}"
        with pytest.raises(ValueError, match=re.escape(f"the pattern {pattern!r} fits") + said):
            make(pattern)
    # All files' tensors, the name in memory, all of another parameter
    for pattern in ("*experts*", "*.experts.gate_up_proj", "*.w2.weight"):
        make(pattern)
