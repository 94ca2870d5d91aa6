"""A worker: one copy of the model with its engine and the task. It evaluates members and repeats every update; alone it
is all that a run needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from es_finetune.errors import RewardFailed
from es_finetune.evaluation.evaluator import Evaluation, Evaluator, in_parts
from es_finetune.monitor.rows import Row, member_line
from es_finetune.optim.evolution_strategy import Update
from es_finetune.runs.identity import task_identity
from es_finetune.runs.log import Generation
from es_finetune.workers.plan import Plan
from es_finetune.workers.replica import Replica


class Worker:
    """A replica and what to ask it. Its methods are those of `protocol.Workers`: a Trainer does not know whether it has
    one worker or many.

    Raises:
        Unaskable: A question that the model cannot be asked, whether it would be drawn or not.
    """

    count = 1

    def __init__(self, replica: Replica, plan: Plan):
        self.replica, self.plan, self.task = replica, plan, plan.task
        self.weights, self.model = replica.weights, replica.model
        self.backend, self.parameters = replica.backend, replica.parameters
        self._held_out = Evaluator(replica.engine, plan.task, plan.held_out)
        # Of all, so that one that cannot be asked is known now, and not when it is drawn
        every = Evaluator(replica.engine, plan.task, plan.task.train)
        self._training = None if plan.prompts else every

    def start(self) -> dict[str, Any]:
        """What the run's log says of its start, and all workers must agree on: the weights, the noise, the questions,
        how answers are scored."""
        return {"model": self.replica.identity, **self.weights.start(), **task_identity(self.task)}

    def fast_forward(self, generations: Sequence[dict[str, Any]], snapshots: Path | None = None) -> None:
        """Repeat logged updates, given as the log's lines, from the model's start. A folder of snapshots that is not
        there, as on another machine, holds none."""
        self.weights.fast_forward(generations, None if snapshots is None else str(snapshots))

    def evaluate(
        self, generation: int, known: dict[int, Row], keep: Callable[[Row], None], with_health: bool = False
    ) -> tuple[list[Row], list[int]]:
        """The lines of all members of the generation in order, those in `known` as they are; and which were dropped
        (none). `keep` gets every new line at once. `with_health`: the update after it will tell the health."""
        members = range(self.plan.population) if self.plan.every_member else self.plan.left(known)
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
        training = self._training or Evaluator(self.replica.engine, self.task, self.plan.training(generation))
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
                    if self.plan.stop_on_reward_error and None in line["rewards"]:
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
        return Evaluator(self.replica.engine, self.task, in_parts(self.plan.held_out, parts)[part])()

    def save_model(self, folder: Path) -> None:
        self.replica.save_model(folder)

    def save_snapshot(self, folder: Path) -> None:
        self.weights.save_snapshot(str(folder))

    def close(self) -> None:
        self.replica.close()


def line_of(update: Update, found: dict[str, Any], dropped: Sequence[int] = ()) -> dict[str, Any]:
    """The log's line of an update and what it came to (Workers.update)."""
    options = (tuple(found["lr"]), tuple(found["sigma"]), found["theta"], found["live"], tuple(dropped))
    return Generation(update.generation, update.z, update.scored, update.mean, *options).to_json()
