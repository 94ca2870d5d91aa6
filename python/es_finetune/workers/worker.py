"""A worker: one copy of the model with its engine and the task. It evaluates members and repeats every update; alone it
is all that a run needs."""

from __future__ import annotations

import datetime
import hashlib
import itertools
import math
import numbers
import random
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from es_finetune.config import CUSTOM_PROMPTS, TrainConfig
from es_finetune.errors import RewardFailed, UserError
from es_finetune.evaluation.evaluator import Evaluation, Evaluator
from es_finetune.monitor.rows import Row, member_line, rewards_by_prompt
from es_finetune.optim.evolution_strategy import Update, make_update
from es_finetune.runs.log import Generation
from es_finetune.runs.setup import make_task
from es_finetune.tasks import Item, Task
from es_finetune.workers.replica import make_replica
from es_kernels.noise import PROMPT_CHOICE, member_seed


class Worker:
    """What a run asks of the model and the task. `start`, `evaluate`, `update` and the rest are also the interface of
    several workers (es_finetune.workers): a Trainer does not know whether it has one or many.

    config:            what to do. Its `model` and `task` are loaded, unless objects are given, as to the Trainer.
    """

    count = 1

    def __init__(self, config: TrainConfig, *, model=None, tokenizer=None, task: Task | None = None):
        self.config = config
        self.task = check_task(task or make_task(config), config)
        self.replica = make_replica(config, self.task, model, tokenizer)
        self.weights, self.model = self.replica.weights, self.replica.model
        self.backend, self.parameters = self.replica.backend, self.replica.parameters
        engine, task = self.replica.engine, self.task
        self._held_out = Evaluator(engine, task, held_out_items(task, config))
        # So that one that cannot be asked is found now, and not when it is drawn
        every = Evaluator(engine, task, task.train)
        self._training = None if config.prompts else every

    def start(self) -> dict[str, Any]:
        """What the run's log says of its start, and all workers must agree on: the weights, the noise, the questions,
        how answers are scored."""
        found = {"model": self.replica.identity, **self.weights.start(), "metric": self.task.metric}
        for split in ("train", "test"):
            items = getattr(self.task, split)
            found[f"{split}_items"] = _digest(repr([(item.prompt, item.key) for item in items]))
            found[f"{split}_scoring"] = _digest(_canonical([item.data for item in items]))
        return {**found, "reward": getattr(self.task, "code_digest", None)}

    def fast_forward(self, generations: Sequence[dict[str, Any]], snapshots: Path | None = None) -> None:
        """Repeat logged updates, given as the log's lines, from the model's start. A folder of snapshots that is not
        there, as on another machine, holds none."""
        self.weights.fast_forward(generations, None if snapshots is None else str(snapshots))

    def evaluate(
        self, generation: int, known: dict[int, Row], keep: Callable[[Row], None], with_health: bool = False
    ) -> tuple[list[Row], list[int]]:
        """The lines of all members of the generation in order, those in `known` as they are; and which were dropped
        (none). `keep` gets every new line at once. `with_health`: the update after it will tell the health."""
        # Without a master every member leaves its rounding in the weights, so that each must be put in place, whether
        # known or not.
        members = range(self.config.population) if self.config.master == "none" else members_left(self.config, known)
        lines = {**known, **{line["member"]: line for line in self.run(generation, members, keep, with_health, known)}}
        return [lines[member] for member in sorted(lines)], []

    def run(
        self,
        generation: int,
        members: Iterable[int],
        keep: Callable[[Row], None],
        with_health: bool = False,
        known: dict[int, Row] | None = None,
    ) -> list[Row]:
        """The lines of these members, which are drawn one at a time."""
        training = self._training or Evaluator(self.replica.engine, self.task, self._draw(generation))
        lines = []
        try:
            if with_health:
                self.weights.perturb(0)
                self.weights.measure_member()
            for member in members:
                self.weights.perturb(member)
                line = (known or {}).get(member)
                if line is None:
                    line = member_line(generation, member, training())
                    if self.config.on_reward_error == "stop" and None in line["rewards"]:
                        raise RewardFailed(f"generation {generation + 1}, member {member}: {line['error']}")
                    keep(line)
                lines.append(line)
        finally:
            self.weights.restore()
        return lines

    def update(self, update: Update, with_health: bool = False) -> dict[str, Any]:
        """Do the update; what Weights.apply returns."""
        return self.weights.apply(list(update), with_health)

    def answer_held_out(self, part: int = 0, parts: int = 1) -> Evaluation:
        """Answers of theta to the held-out questions, or to one of `parts` equal parts of them."""
        if parts == 1:
            return self._held_out()
        return Evaluator(self.replica.engine, self.task, split(held_out_items(self.task, self.config), parts)[part])()

    def save_model(self, folder: Path) -> None:
        self.replica.save_model(folder)

    def save_snapshot(self, folder: Path) -> None:
        self.weights.save_snapshot(str(folder))

    def close(self) -> None:
        self.replica.close()

    def _draw(self, generation: int) -> list[Item]:
        """The generation's training prompts, the same for all its members: a draw without repetition."""
        draws = random.Random(member_seed(self.config.seed, generation, 0, PROMPT_CHOICE))
        return draws.sample(list(self.task.train), self.config.prompts)


def check_task(task: Task, config: TrainConfig) -> Task:
    """ValueError unless the task has what the config asks for. A number of prompts that the config left open is settled
    here."""
    for split in ("train", "test"):
        if not getattr(task, split):
            raise UserError(f"task {config.task} has no {split} items")
    if config.prompts is None:
        config.prompts = CUSTOM_PROMPTS if len(task.train) > CUSTOM_PROMPTS else 0
    if config.prompts > len(task.train):
        raise UserError(
            f"prompts must be at most {len(task.train)}, the training prompts of {config.task}, not {config.prompts}"
        )
    return task


def held_out_items(task: Task, config: TrainConfig) -> Sequence[Item]:
    return task.test[: config.eval_items or None]


def split(items: Sequence, parts: int) -> list[Sequence]:
    """`items` in so many runs, whose lengths differ by at most one."""
    ends = [len(items) * part // parts for part in range(parts + 1)]
    return [items[start:end] for start, end in itertools.pairwise(ends)]


def members_left(config: TrainConfig, known: Container[int]) -> list[int]:
    """The members that are not known yet."""
    return [member for member in range(config.population) if member not in known]


def line_of(update: Update, found: dict[str, Any], dropped: Sequence[int] = ()) -> dict[str, Any]:
    """The log's line of an update and what it came to (Workers.update)."""
    options = (tuple(found["lr"]), tuple(found["sigma"]), found["theta"], found["live"], tuple(dropped))
    return Generation(update.generation, update.z, update.scored, update.mean, *options).to_json()


def known_members(lines: Sequence[Row], generation: int, config: TrainConfig) -> dict[int, Row]:
    """The members of a generation that a journal holds, without those whose failure shall stop the run again."""
    stop = config.on_reward_error == "stop"
    return {
        line["member"]: line
        for line in lines
        if line["generation"] == generation and not (stop and None in line["rewards"])
    }


def update_of(
    task: Task, config: TrainConfig, generation: int, lines: Sequence[Row], dropped: Sequence[int]
) -> tuple[Update, list[list[float]]]:
    """The update that the members' lines ask for, and the rewards [member][prompt] of those that were not dropped. The
    same on every worker."""
    by_prompt = rewards_by_prompt(task, lines)
    means = [math.fsum(row) / len(row) for row in by_prompt]
    rewards: list[Any] = [None] * config.population
    for line, of_member in zip(lines, by_prompt if config.shaping == "per_prompt" else means, strict=True):
        rewards[line["member"]] = of_member
    shaping = {"population": config.population, "shaping": config.shaping, "antithetic": config.antithetic}
    return make_update(generation, rewards, dropped, **shaping), by_prompt


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "backslashreplace"), digest_size=8).hexdigest()


def _canonical(value: Any) -> str:
    """Equal for equal data in any process: dicts and sets in the order of their entries' texts, arrays as lists, other
    objects by their type alone."""
    if hasattr(value, "tolist"):  # of NumPy and torch
        value = value.tolist()
    if value is None or isinstance(
        value, (str, bytes, numbers.Number, datetime.date, datetime.time, datetime.timedelta)
    ):
        return repr(value)
    if isinstance(value, Mapping):
        return f"{{{','.join(sorted(f'{_canonical(key)}:{_canonical(entry)}' for key, entry in value.items()))}}}"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_canonical, value))}]"
    if isinstance(value, (set, frozenset)):
        return f"set({','.join(sorted(map(_canonical, value)))})"
    return f"<{type(value).__qualname__}>"
