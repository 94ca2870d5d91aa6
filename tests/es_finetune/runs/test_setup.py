"""Contract under test: a run says which parameters it would tune if its members shared no batch, and is silent where
they are none, or nobody asked for them."""

import types

import pytest
import torch

from es_finetune.config import TrainConfig
from es_finetune.runs.setup import tell_what_is_left_out
from es_kernels import NamedTensor


@pytest.mark.parametrize(
    "options, told",
    [
        ({}, "2 parameters are not tuned, 33 % of the weights, such as norm;"),
        ({"freeze": ["embed"]}, "2 parameters are not tuned, 50 % of the weights, such as norm;"),
        ({"freeze": ["*norm"]}, ""),
        ({"tune": ["v_proj"]}, ""),
    ],
    ids=str,
)
def test_what_is_left_out_is_told(caplog, options, told):
    names = ("embed", "norm", "v_proj", "last.norm")
    entries = [NamedTensor(name, torch.nn.Parameter(torch.zeros(2 if "norm" in name else 4))) for name in names]
    members = types.SimpleNamespace(names={"embed", "v_proj"})
    with caplog.at_level("INFO"):
        tell_what_is_left_out(entries, members, TrainConfig(**options))
        tell_what_is_left_out(entries, None, TrainConfig(**options))
    assert told in caplog.text and len(caplog.records) == bool(told)
