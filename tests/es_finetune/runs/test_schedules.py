"""Contract under test: sigma and lr of a generation follow from its number and from where each group began."""

import pytest
import torch

from es_finetune import EvolutionStrategy
from es_finetune.runs.groups import param_groups
from es_finetune.runs.schedules import Schedules, scale
from es_kernels import NamedTensor


def test_they_begin_at_one_and_end_where_they_should():
    for schedule in ("linear", "cosine"):
        values = [scale(schedule, g, 11, 0.1) for g in range(11)]
        assert values[0] == 1 and values[-1] == pytest.approx(0.1) and values == sorted(values, reverse=True)
        assert values[5] == pytest.approx(0.55)
    assert scale("constant", 5, 11, 0.1) == scale("linear", 0, 1, 0.1) == 1


def test_a_line_and_half_a_cosine_lie_between_and_the_end_stays():
    assert [scale("linear", g, 5, 0.2) for g in range(5)] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    # (1 + cos(45 deg)) / 2 = 0.853553
    assert [scale("cosine", g, 5, 0.0) for g in range(5)] == pytest.approx([1, 0.853553, 0.5, 0.146447, 0], abs=1e-6)
    assert [scale("constant", g, 5, 0.2) for g in range(5)] == [1] * 5
    assert scale("linear", 5, 5, 0.2) == scale("linear", 4, 5, 0.2)


def test_lr_and_sigma_have_each_a_schedule_of_their_own():
    optimizer = EvolutionStrategy([("norm", torch.nn.Parameter(torch.zeros(3)))], population=2)
    (group,) = optimizer.param_groups
    group["initial_sigma"] = 0.4
    optimizer.generation = 1
    Schedules(0.1, "linear", "cosine", final_scale=0.0, generations=5).set(optimizer)
    assert (group["lr"], group["sigma"]) == pytest.approx((0.075, 0.4 * 0.853553))


def test_each_group_falls_from_its_own_sigma():
    entries = [NamedTensor(name, torch.nn.Parameter(torch.zeros(3))) for name in ("norm", "weight")]
    optimizer = EvolutionStrategy(param_groups(entries, 0.2, sigma_for=[("norm", 0.4)]), population=2)
    schedules = Schedules(0.1, "constant", "linear", final_scale=0.5, generations=3)
    seen = []
    for generation in (0, 1, 2, 1):  # of a resumed run too: nothing adds up
        optimizer.generation = generation
        schedules.set(optimizer)
        seen.append([(group["lr"], group["sigma"]) for group in optimizer.param_groups])
    assert seen[:3] == [[(0.1, pytest.approx(s * sigma)) for sigma in (0.4, 0.2)] for s in (1, 0.75, 0.5)]
    assert seen[3] == seen[1]
