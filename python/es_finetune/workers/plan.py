"""What a generation asks of the workers, and the update that their answers come to: the same on all of them."""

from __future__ import annotations

import math
import random
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

from es_finetune.engines import Sampling
from es_finetune.evaluation.evaluator import floor_of
from es_finetune.monitor.rows import Row
from es_finetune.optim.update import Update, make_update
from es_finetune.tasks import Item, Task
from es_kernels.noise import PROMPT_CHOICE, SAMPLING, member_seed


@dataclass(frozen=True)
class Plan:
    """What all workers of a run do alike in every generation.

    Attributes:
        task: What is asked and how answers are scored.
        population: Members of a generation.
        prompts: Training questions drawn for each generation; 0: all of them, each time.
        eval_items: How many held-out questions are asked; 0: all.
        seed: Of the run. With the generation's number it decides the draw.
        shaping: Of the rewards: a name in `optim.shaping.SHAPINGS`.
        antithetic: Whether members come in pairs of opposite noise.
        stop_on_reward_error: Whether a reward that fails ends the run, or counts as the lowest.
        every_member: Put each member in place, though its rewards be known: without a master each leaves its
            rounding behind, which is part of what the next one starts from.
        at_once: Members that a worker is given, and answers for, together, at most.
        temperature: Of training answers; 0: greedy.
        samples: Of them for each prompt.
        objective: A prompt's reward is that of its "best" sample, or their "mean".
    """

    task: Task
    population: int
    prompts: int
    eval_items: int
    seed: int
    shaping: str
    antithetic: bool
    stop_on_reward_error: bool
    every_member: bool
    at_once: int = 1
    temperature: float = 0.0
    samples: int = 1
    objective: str = "mean"

    @property
    def held_out(self) -> Sequence[Item]:
        """The held-out questions that are asked."""
        return self.task.test[: self.eval_items or None]

    def training(self, generation: int) -> Sequence[Item]:
        """The generation's training questions, the same for all its members: a draw without repetition, or all."""
        if not self.prompts:
            return self.task.train
        draws = random.Random(member_seed(self.seed, generation, 0, PROMPT_CHOICE))
        return draws.sample(list(self.task.train), self.prompts)

    def sampling(self, generation: int) -> Sampling | None:
        """How the generation's training answers are drawn, with the same random numbers for all its members; None:
        greedy."""
        if not self.temperature:
            return None
        return Sampling(self.temperature, member_seed(self.seed, generation, 0, SAMPLING))

    def known(self, lines: Sequence[Row], generation: int) -> dict[int, Row]:
        """The members of a generation that the lines of journals hold, by number. Without those whose failure will stop
        the run again."""
        return {
            line["member"]: line
            for line in lines
            if line["generation"] == generation and not (self.stop_on_reward_error and None in line["rewards"])
        }

    def left(self, known: Container[int]) -> list[int]:
        """The members that are not known yet, in the order in which they are handed out."""
        return [member for member in range(self.population) if member not in known]

    def group(self, workers: int) -> int:
        """Members to give together to one of so many workers: not so many that another has none."""
        return min(self.at_once, -(-self.population // workers))

    def update(
        self, generation: int, lines: Sequence[Row], dropped: Sequence[int] = ()
    ) -> tuple[Update, list[list[float]]]:
        """What the lines of a generation's members come to.

        Args:
            generation: Counted from 0.
            lines: One for each member that was not dropped, in their order (`rows.member_line`).
            dropped: The members without a line.

        Returns:
            The update, and the rewards [line][prompt] that it is made of.
        """
        # Of an answer whose scoring failed the floor among the whole generation's
        floor = floor_of(self.task, (reward for line in lines for reward in line["rewards"]))
        by_prompt = [[floor if reward is None else reward for reward in line["rewards"]] for line in lines]
        means = [math.fsum(row) / len(row) for row in by_prompt]
        rewards: list[Any] = [None] * self.population
        for line, of_member in zip(lines, by_prompt if self.shaping == "per_prompt" else means, strict=True):
            rewards[line["member"]] = of_member
        shaping: dict[str, Any] = {"shaping": self.shaping, "antithetic": self.antithetic}
        return make_update(generation, rewards, dropped, population=self.population, **shaping), by_prompt
