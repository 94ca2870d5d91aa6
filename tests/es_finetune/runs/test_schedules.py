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
