"""A worker: one copy of the model with its engine and the task. It evaluates members and repeats every update; alone it
is all that a run needs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from es_finetune.errors import RewardFailed
from es_finetune.evaluation.evaluator import Evaluation, Evaluator, HeldOut, LogProbEvaluator, in_parts
from es_finetune.monitor.rows import Row, member_line
from es_finetune.optim.update import Update
from es_finetune.runs.environment import machine
from es_finetune.runs.identity import task_identity
from es_finetune.tasks import Item, reads
from es_finetune.workers.plan import Plan
from es_finetune.workers.replica import Replica


class Worker:
    """A replica and what to ask it. Its methods are those of `protocol.Workers`: a Trainer does not know whether it has
    one worker or many.

    Args:
        replica: The model with the run's weights.
        plan: What a generation asks.

    Attributes:
        group: How many members to answer for together, at most.

    Raises:
        Unaskable: A question that the model cannot be asked, whether it would be drawn or not.
    """

    count = 1

    def __init__(self, replica: Replica, plan: Plan):
        self.replica, self.plan, self.task = replica, plan, plan.task
        self.group = plan.at_once
        self.weights, self.model = replica.weights, replica.model
        self.backend, self.parameters = replica.backend, replica.parameters
        self.machine = machine(replica.backend)
        self._held_out = HeldOut(replica.engine, plan.task, plan.held_out)
        # Of all, so that one that cannot be asked is known now, and not when it is drawn
        every = self._evaluator(plan.task.train)
        self._training = None if plan.prompts else every

    def start(self) -> dict[str, Any]:
        """What the log's header says of the run's start, and all workers must agree on.

        Returns:
            `model`, and what `replay.start_of` and `identity.task_identity` say: plain JSON.
        """
        return {"model": self.replica.identity, **self.weights.start(), **task_identity(self.task)}

    def fast_forward(self, generations: Sequence[dict[str, Any]], snapshots: Path | None = None) -> None:
        """Repeat logged updates from the model's start.

        Args:
            generations: Lines of the log, without its header.
            snapshots: A folder of snapshots, to begin at one of them. One that is not there, as on another machine,
                holds none.

        Raises:
            UserError: The weights after a generation are not those of the log.
        """
        self.weights.fast_forward(generations, None if snapshots is None else str(snapshots))

    def evaluate(
        self, generation: int, known: dict[int, Row], keep: Callable[[Row], None], with_health: bool = False
    ) -> tuple[list[Row], list[int]]:
        """Score the members of a generation.

        Args:
            generation: Counted from 0; the updates before it are done.
            known: Lines of members that were scored before, by number. They count as they are.
            keep: Gets every new line as soon as there is one.
            with_health: The update that follows will be asked for the health.

        Returns:
            The members' lines (`rows.member_line`) in their order, and which members were dropped: here none.

        Raises:
            RewardFailed: A reward failed, and the plan stops on that.
        """
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
        """Score these members, which are drawn as they are needed. Arguments and errors as for `evaluate`.

        Returns:
            Their lines, in the order of `members`.
        """
        lines = []
        try:
            if with_health and not self.replica.together:  # whose noise is never rounded to the weights' dtype
                self.weights.perturb(0)
                self.weights.measure_member()
            for member, evaluation in self._answered(generation, members, known or {}):
                if evaluation is None:
                    line = (known or {})[member]
                else:
                    line = member_line(generation, member, evaluation)
                    failed = any(score.reward is None for score in evaluation.scores)
                    if self.plan.stop_on_reward_error and failed:
                        raise RewardFailed(f"generation {generation + 1}, member {member}: {line['error']}")
                    keep(line)
                lines.append(line)
        finally:
            self.weights.restore()
        return lines

    def _answered(
        self, generation: int, members: Iterable[int], known: Container[int]
    ) -> Iterator[tuple[int, Evaluation | None]]:
        """Members and what their answers are worth; None for a known one, which is only put in place."""
        training = self._training or self._evaluator(self.plan.training(generation))
        sampling = self.plan.sampling(generation)
        if self.replica.together:
            drawn = iter(members)
            while group := list(itertools.islice(drawn, self.group)):
                yield from zip(group, training.together(self.weights.noise(group), sampling), strict=True)
        else:
            for member in members:
                self.weights.perturb(member)
                yield member, None if member in known else training(sampling)

    def _evaluator(self, items: Sequence[Item]) -> Evaluator:
        kind = LogProbEvaluator if reads(self.task) else Evaluator
        return kind(
            self.replica.engine,
            self.task,
            items,
            samples=self.plan.samples,
            objective=self.plan.objective,
            members=self.plan.at_once if self.replica.together else 1,
        )

    def update(self, update: Update, with_health: bool = False) -> dict[str, Any]:
        """Do the update; what Weights.apply returns."""
        return self.weights.apply(update.to_json(), with_health)

    def answer_held_out(self, part: int = 0, parts: int = 1) -> Evaluation:
        """Answers of theta to the held-out questions, or to the one of `parts` nearly equal parts of them."""
        if parts == 1:
            return self._held_out()
        return HeldOut(self.replica.engine, self.task, in_parts(self.plan.held_out, parts)[part])()

    def stop(self) -> None:
        """No generation follows, though the config asks for more. Who only does what it is told has nothing to do."""

    def save_model(self, folder: Path) -> None:
        """Write the live weights as a model that `from_pretrained` loads."""
        self.replica.save_model(folder)

    def save_snapshot(self, folder: Path) -> None:
        """Write theta into a folder of snapshots, and remove older ones."""
        self.weights.save_snapshot(str(folder))

    def close(self) -> None:
        """Let go of engine and model."""
        self.replica.close()
