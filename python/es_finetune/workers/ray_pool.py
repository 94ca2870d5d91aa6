"""A pool of Ray actors as workers. Members go out one at a time; an actor that dies is replaced, and the new one
repeats the log.

The driver holds no weights: log, scores and questions only. What it keeps of a generation (run.log, journal) is all
that a run needs to go on.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from es_finetune.errors import RewardFailed, UserError, first_line
from es_finetune.evaluation.evaluator import Evaluation
from es_finetune.monitor.rows import Row
from es_finetune.optim.evolution_strategy import Update
from es_finetune.workers.dispatch import Dispatch
from es_finetune.workers.plan import Plan
from es_finetune.workers.protocol import WorkersDiffer, require_agreement, require_same_run
from es_finetune.workers.worker import Worker, line_of

# After so many deaths without a single result in between, something else is wrong than a machine.
_DEATHS = 3
# A worker that takes so many times the limit hangs, and is replaced.
_HANGS = 3


class Actor:
    """A worker in a process of its own. What it is asked comes with the number of the generation that it must be at."""

    def __init__(self, make_worker: Callable[[], Worker]):
        self.make_worker = make_worker

    def start(self) -> dict[str, Any]:
        self.worker = self.make_worker()  # not in the constructor, whose errors Ray reports as a death
        start = self.worker.start()
        return {
            "start": start,
            "host": socket.gethostname(),
            "backend": self.worker.backend,
            "parameters": self.worker.parameters,
        }

    def fast_forward(self, generations: Sequence[Row], snapshots: Path | None) -> None:
        self.worker.fast_forward(generations, snapshots)

    def member(self, generation: int, member: int, with_health: bool) -> Row:
        (line,) = self.worker.run(generation, [member], lambda line: None, with_health)
        return line

    def update(self, update: Update, with_health: bool) -> dict[str, Any]:
        return self.worker.update(update, with_health)

    def answer_held_out(self, part: int, parts: int) -> Evaluation:
        return self.worker.answer_held_out(part, parts)

    def save_model(self, folder: Path) -> None:
        self.worker.save_model(folder)

    def save_snapshot(self, folder: Path) -> None:
        self.worker.save_snapshot(folder)


@dataclasses.dataclass
class Slot:
    """One actor after the other."""

    number: int
    actor: Any = None
    host: str = "?"
    generation: int = 0  # updates that it has done, or been asked to do
    call: Any = None  # what it is at
    what: tuple = ()  # ("start",), ("catch up",), ("job", spread, job), ("update",)
    since: float = 0.0
    limit: float | None = None  # seconds that it should take at most
    deaths: int = 0  # since the last result

    @property
    def name(self) -> str:
        return f"worker {self.number} on {self.host}"


@dataclasses.dataclass(frozen=True)
class PoolOptions:
    """How many actors a pool has, and how long it waits for one.

    Attributes:
        workers: How many; 0: as many as the cluster has GPUs for.
        gpus: Of each actor, where the cluster has any; 0: they compute on CPUs.
        straggler_limit: Seconds after which a member that is still out goes to another actor too; None: never.
        drop_stragglers: Leave the member out of its generation instead.
    """

    workers: int
    gpus: int
    straggler_limit: float | None = None
    drop_stragglers: bool = False


class RayPool:
    """The workers of a run in a Ray cluster: the one that RAY_ADDRESS names or that was started on this machine, else
    one of this process.

    Args:
        plan: What a generation asks.
        make_worker: What each actor calls to make its worker, where it runs; it is pickled.
        options: How many actors, and how long to wait for them.

    Raises:
        UserError: The cluster cannot be reached, or has no room for so many actors.
    """

    model = None  # it is in the actors

    def __init__(self, plan: Plan, make_worker: Callable[[], Worker], options: PoolOptions):
        import ray

        self.ray = ray
        self.plan, self.task = plan, plan.task
        self._own = _connect(self.ray)
        try:
            self.count, gpus = _capacity(self.ray, options)
            self._resources = {"num_gpus": gpus, "num_cpus": 1, "max_restarts": 0, "max_task_retries": 0}
            self._make_worker = make_worker
            self._log: list[Row] = []  # lines of the generations done, which a new actor repeats
            self._snapshots: Path | None = None
            self._start: dict[str, Any] | None = None
            self._limit, self._drop = options.straggler_limit, options.drop_stragglers
            self._health_actor: Any = None  # the actor that has looked at a member of this generation
            self.slots = [Slot(number) for number in range(self.count)]
            for slot in self.slots:
                self._start_actor(slot)
        except BaseException:
            self.close()
            raise

    # --- what a Trainer asks
    # -------------------------------------------------------------------------------------------

    def start(self) -> dict[str, Any]:
        while any(slot.what == ("start",) for slot in self.slots):
            self._wait(None)
        return self._start

    def fast_forward(self, generations: Sequence[Row], snapshots: Path | None = None) -> None:
        """The actors do it when they are first asked for something: all at once, and a slow one holds nobody up."""
        self._log, self._snapshots = list(generations), None if snapshots is None else snapshots.resolve()

    def evaluate(
        self, generation: int, known: dict[int, Row], keep: Callable[[Row], None], with_health: bool = False
    ) -> tuple[list[Row], list[int]]:
        lines = dict(known)

        def take(member: int, line: Row) -> None:
            keep(line)
            lines[member] = line

        self._health_actor = None

        def ask(slot: Slot, member: int) -> Any:
            measures = with_health and self._health_actor is None
            if measures:
                self._health_actor = slot.actor
            return slot.actor.member.remote(generation, member, measures)

        dispatch = Dispatch(self.plan.left(known), self._limit, self._drop)
        self._spread(dispatch, ask, take)
        return [lines[member] for member in sorted(lines)], sorted(dispatch.dropped)

    def update(self, update: Update, with_health: bool = False) -> dict[str, Any]:
        found: dict[str, dict[str, Any]] = {}
        one = None
        # All that are free do it now, at the same time; who is late with a member, or new, repeats it from the log
        # before its next work.
        while True:
            self._catch_up_and_replace()
            for slot in self._ready():
                slot.generation += 1
                measures = with_health and slot.actor == self._health_actor
                self._ask(slot, ("update", measures), slot.actor.update.remote(update, measures), self._limit)
            pending = [slot for slot in self.slots if slot.what[:1] == ("update",)]
            if found and (
                not pending or (self._limit and time.monotonic() - min(slot.since for slot in pending) > self._limit)
            ):
                break
            for slot, what, result in self._wait(self._limit):
                if what[0] == "update":
                    found[slot.name] = result
                    one = result if one is None or what[1] else one
        one = require_agreement(update, found, one)
        self._log.append(line_of(update, one))
        return one

    def answer_held_out(self) -> Evaluation:
        found: dict[int, Evaluation] = {}
        questions = len(self.plan.held_out)
        parts = min(self.count, questions)
        # The limit is one of a member; a part has more questions, or fewer.
        longer = max(1.0, questions / parts / (self.plan.prompts or len(self.task.train)))
        dispatch = Dispatch(range(parts), self._limit and self._limit * longer)
        self._spread(dispatch, lambda slot, part: slot.actor.answer_held_out.remote(part, parts), found.__setitem__)
        return Evaluation.joined([found[part] for part in range(parts)])

    def save_model(self, folder: Path) -> None:
        """Written by one of the workers: ValueError where that is not this machine and the folder is not shared."""
        folder = folder.resolve()
        self._spread(Dispatch([0]), lambda slot, _: slot.actor.save_model.remote(folder), lambda *_: None)
        if not folder.is_dir():
            raise UserError(
                f"the model was written to {folder} on another machine of the cluster: use a shared folder, or "
                "--save_model false and es-finetune export, "
                "which needs the log alone"
            )

    def save_snapshot(self, folder: Path) -> None:
        folder = folder.resolve()
        self._snapshots = folder
        self._spread(Dispatch([0]), lambda slot, _: slot.actor.save_snapshot.remote(folder), lambda *_: None)

    def close(self) -> None:
        for slot in getattr(self, "slots", ()):
            self._kill_actor(slot)
        if self._own:
            self.ray.shutdown()

    # --- actors
    # ----------------------------------------------------------------------------------------------------------

    def _spread(self, dispatch: Dispatch, ask: Callable[[Slot, int], Any], take: Callable[[int, Any], None]) -> None:
        """Have every job of the dispatch done by some actor, whatever becomes of others. `take` gets the first result
        of each."""
        spread = object()  # results of another are too late
        while True:
            self._catch_up_and_replace(dispatch)
            dispatch.give_up(time.monotonic())
            for slot in self._ready():
                job = dispatch.next(slot.number, time.monotonic())
                if job is not None:
                    self._ask(slot, ("job", spread, job), ask(slot, job), dispatch.limit)
            if dispatch.finished:
                return
            # Who would take a member that gets late: without anyone free there is nothing to wake up for.
            due = dispatch.overdue() if dispatch.drop or self._ready() else None
            for slot, what, result in self._wait(None if due is None else due - time.monotonic(), dispatch):
                if what[0] == "job" and what[1] is spread and dispatch.done(what[2]):
                    take(what[2], result)
                elif what[0] == "update":  # of one that was late with it
                    done = self._log[slot.generation - 1]
                    proof = {key: int(done[key], 16) for key in ("theta", "live")}
                    require_agreement(
                        Update(done["generation"], 0.0, 0, None),
                        {"the log": {**result, **proof}, slot.name: result},
                        result,
                    )

    def _ready(self) -> list[Slot]:
        """The actors that have nothing to do and all updates done."""
        return [slot for slot in self.slots if slot.call is None and slot.generation == len(self._log)]

    def _ask(self, slot: Slot, what: tuple, call: Any, limit: float | None = None) -> None:
        slot.call, slot.what, slot.since, slot.limit = call, what, time.monotonic(), limit

    def _catch_up_and_replace(self, dispatch: Dispatch | None = None) -> None:
        """Bring free actors to the log's end, and replace those that hang."""
        for slot in self.slots:
            if slot.call is None and slot.generation < len(self._log):
                behind = self._log[slot.generation :]
                snapshots = self._snapshots if slot.generation == 0 else None
                slot.generation = len(self._log)
                self._ask(slot, ("catch up",), slot.actor.fast_forward.remote(behind, snapshots))
            elif slot.call is not None and slot.limit and time.monotonic() - slot.since > _HANGS * slot.limit:
                self._replace(
                    slot, f"it took more than {_HANGS} times the straggler limit of {slot.limit:g} s", dispatch
                )

    def _wait(self, timeout: float | None, dispatch: Dispatch | None = None) -> list[tuple[Slot, tuple, Any]]:
        """What one of the actors came back with, as (slot, what it was asked, result); nothing after `timeout` seconds,
        or where one died or hangs."""
        calls = {slot.call: slot for slot in self.slots if slot.call is not None}
        now = time.monotonic()
        waits = [slot.since + _HANGS * slot.limit - now for slot in calls.values() if slot.limit] + (
            [] if timeout is None else [timeout]
        )
        ready, _ = self.ray.wait(list(calls), num_returns=1, timeout=max(0.05, min(waits)) if waits else None)
        if not ready:
            return []
        slot = calls[ready[0]]
        what, slot.call, slot.what = slot.what, None, ()
        try:
            result = self.ray.get(ready[0])
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, (ValueError, OSError, RewardFailed, WorkersDiffer)):
                raise error.cause from None  # it would be the same on any other
            self._replace(slot, first_line(error.cause), dispatch)
            return []
        except self.ray.exceptions.RayError as error:
            self._replace(slot, first_line(error), dispatch)
            return []
        if what[0] == "start":
            self._on_started(slot, result)
        else:
            slot.deaths = 0
        return [(slot, what, result)]

    def _start_actor(self, slot: Slot) -> None:
        slot.actor = self.ray.remote(Actor).options(**self._resources).remote(self._make_worker)
        slot.generation = 0
        self._ask(slot, ("start",), slot.actor.start.remote())

    def _on_started(self, slot: Slot, found: dict[str, Any]) -> None:
        slot.host = found["host"]
        if self._start is None:
            self._start, self.backend, self.parameters = found["start"], found["backend"], found["parameters"]
        require_same_run(slot.name, found["start"], self._start)

    def _replace(self, slot: Slot, why: str, dispatch: Dispatch | None) -> None:
        slot.deaths += 1
        if slot.deaths > _DEATHS:
            raise RuntimeError(f"{slot.name} died {slot.deaths} times without a result in between; at last: {why}")
        if dispatch is not None:
            dispatch.lost(slot.number)
        self._kill_actor(slot)
        self._start_actor(slot)

    def _kill_actor(self, slot: Slot) -> None:
        if slot.actor is not None:
            self.ray.kill(slot.actor)
            slot.actor = slot.call = None


def _connect(ray) -> bool:
    """Joins the cluster; whether it is one that ends with this process."""
    if ray.is_initialized():
        return False
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdigit():  # asked first, because Ray would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(include_dashboard=None if address else False, log_to_driver=False, logging_level="ERROR")
    except (ray.exceptions.RayError, RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"the Ray cluster {address or 'of this machine'} cannot be reached: {first_line(error)}"
        ) from None
    return True


def _capacity(ray, options: PoolOptions) -> tuple[int, int]:
    """(workers, GPUs of each). ValueError where the cluster has no room for them."""
    have = ray.cluster_resources()
    gpus = options.gpus if have.get("GPU") else 0
    count = options.workers or int(have.get("GPU", 0)) // max(1, options.gpus)
    if not count:
        raise UserError("the Ray cluster has no GPU: say with --ray_workers how many workers shall compute on its CPUs")
    for what, needed in (("GPU", gpus * count), ("CPU", count)):
        if needed > have.get(what, 0):
            raise UserError(
                f"{count} workers need {needed} {what}s, and the Ray cluster has {have.get(what, 0):g}: lower "
                "--ray_workers, or add machines"
            )
    return count, gpus
