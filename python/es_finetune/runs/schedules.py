"""How sigma and lr fall in the course of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from es_finetune.optim.evolution_strategy import EvolutionStrategy


@dataclass(frozen=True)
class Schedules:
    """lr and sigma of each generation: functions of its number alone, so that a resumed run needs no state for them.

    Attributes:
        lr: In the first generation. Sigma begins at each param_group's `initial_sigma`.
        lr_schedule: "constant", "linear" or "cosine".
        sigma_schedule: The same for sigma.
        final_scale: What lr and sigma are multiplied by in the last generation, unless constant.
        generations: Of the whole run.
    """

    lr: float
    lr_schedule: str
    sigma_schedule: str
    final_scale: float
    generations: int

    def set(self, optimizer: EvolutionStrategy) -> None:
        """Set lr and sigma of each group for the optimizer's present generation."""
        lr_scale, sigma_scale = (
            scale(schedule, optimizer.generation, self.generations, self.final_scale)
            for schedule in (self.lr_schedule, self.sigma_schedule)
        )
        for group in optimizer.param_groups:
            group["lr"] = self.lr * lr_scale
            group["sigma"] = group["initial_sigma"] * sigma_scale


def scale(schedule: str, generation: int, generations: int, final: float) -> float:
    """1 in the first generation, `final` in the last; in between on a line, on half a cosine, or 1 all along."""
    if schedule == "constant" or generations == 1:
        return 1.0
    progress = min(generation / (generations - 1), 1.0)
    if schedule == "linear":
        return 1 + (final - 1) * progress
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
