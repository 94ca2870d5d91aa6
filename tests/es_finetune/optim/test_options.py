"""Contract under test: the optimizer's options are checked without an optimizer, by the functions that it calls itself,
and come back as plain values.
"""

import numpy as np
import pytest
import torch

import es_kernels
from es_finetune import EvolutionStrategy
from es_finetune.errors import UserError
from es_finetune.optim import options, shaping

RUN = {
    "population": 4,
    "seed": 0,
    "master": "fp32",
    "antithetic": False,
    "shaping": "zscore",
    "momentum": 0.0,
    "momentum_window": 8,
    "perturb_rounding": "nearest",
    "update_rounding": None,
}
GROUP = {"sigma": 0.1, "lr": 0.1, "weight_decay": 0.0, "noise_rank": 0}


def test_plain_values_come_back():
    checked = options.check_options(**{**RUN, "population": np.int64(4), "seed": np.uint64(2**64 - 1), "momentum": 0})
    assert checked == {**RUN, "seed": 2**64 - 1, "update_rounding": "nearest"}
    assert [type(checked[name]) for name in ("population", "seed", "momentum")] == [int, int, float]
    for master in ("copy", None):
        assert options.check_options(**{**RUN, "master": master})["update_rounding"] == "stochastic"
    assert options.check_group(**{**GROUP, "lr": np.float32(0.5)}) == {**GROUP, "lr": 0.5}
    rank = options.check_group(**{**GROUP, "noise_rank": np.int64(64)})["noise_rank"]
    assert type(rank) is int and rank == options.MAX_RANK == es_kernels.low_rank.MAX_RANK


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"master": "fp8"}, "master must be"),
        ({"shaping": "rank"}, "shaping must be"),
        ({"momentum": 1}, "momentum must be at least 0 and less than 1, not 1.0"),
        ({"perturb_rounding": "up"}, "perturb_rounding must be"),
        ({"master": None, "perturb_rounding": "stochastic"}, "needs weights to return to"),
        ({"population": 1}, "population must be at least 2"),
        ({"population": 5, "antithetic": True}, "population must be even"),
        ({"seed": 2**64}, "seed must be a whole number of 64 bits"),
        ({"sigma": 0}, "sigma must be a positive number"),
        ({"lr": 1e-30, "weight_decay": 1e-30}, "the decay, lr \\* weight_decay, must be a number that float32 holds"),
        ({"noise_rank": -1}, "noise_rank must be at least 0, not -1"),
        ({"noise_rank": 65}, "noise_rank must be at most 64, not 65"),
        ({"noise_rank": 1.0}, "noise_rank must be a whole number, not 1.0"),
        ({"noise_rank": True}, "noise_rank must be a whole number, not True"),
    ],
    ids=str,
)
def test_the_optimizer_refuses_by_the_same_words(wrong, words):
    whole_run = wrong.keys() <= RUN.keys()
    with pytest.raises(UserError, match=words) as alone:
        options.check_options(**{**RUN, **wrong}) if whole_run else options.check_group(**{**GROUP, **wrong})
    with pytest.raises(UserError) as optimizer:
        EvolutionStrategy([("w", torch.nn.Parameter(torch.zeros(1)))], **wrong)
    assert str(optimizer.value) == str(alone.value)


def test_the_names_of_the_shapings_are_those_there_are():
    assert options.SHAPINGS == tuple(shaping.SHAPINGS)
