"""A pool of Ray actors as workers. Members go out one at a time; an actor that dies is replaced, and the new one
repeats the log.

The driver holds no weights: log, scores and questions only. What it keeps of a generation (run.log, journal) is all
that a run needs to go on.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from es_finetune.errors import RunError, UserError, WorkersDiffer, first_line
from es_finetune.evaluation.evaluator import Evaluation
from es_finetune.monitor.rows import Row
from es_finetune.optim.update import Update
from es_finetune.runs.log import Generation
from es_finetune.tasks import reads
from es_finetune.workers.dispatch import Dispatch
from es_finetune.workers.plan import Plan
from es_finetune.workers.protocol import require_agreement, require_same_run
from es_finetune.workers.worker import Worker

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
            "machine": self.worker.machine,
        }

    def fast_forward(self, generations: Sequence[Row], snapshots: Path | None) -> None:
        self.worker.fast_forward(generations, snapshots)

    def members(self, generation: int, members: Sequence[int], with_health: bool) -> list[Row]:
        return self.worker.run(generation, members, lambda line: None, with_health)

    def update(self, update: Update, with_health: bool) -> dict[str, Any]:
        return self.worker.update(update, with_health)

    def answer_held_out(self, part: int, parts: int) -> Evaluation:
        return self.worker.answer_held_out(part, parts)

    def save_model(self, folder: Path) -> None:
        self.worker.save_model(folder)

    def save_snapshot(self, folder: Path) -> None:
        self.worker.save_snapshot(folder)


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """What an actor is busy with.

    Attributes:
        reference: Of Ray, to what it will come back with.
        on_result: Called with that, once.
        on_lost: Called instead where the actor dies or hangs.
        limit: Seconds that it should take at most; None: as long as it takes.
        since: When it was asked, in seconds of `time.monotonic`.
    """

    reference: Any
    on_result: Callable[[Any], object]
    on_lost: Callable[[], object] = lambda: None
    limit: float | None = None
    since: float = dataclasses.field(default_factory=lambda: time.monotonic())

    @property
    def hangs_at(self) -> float:
        """When the actor counts as hanging, by the same clock."""
        return math.inf if self.limit is None else self.since + _HANGS * self.limit


@dataclasses.dataclass
class Slot:
    """A place in the pool: one actor after the other.

    Attributes:
        number: Of the place, from 0.
        actor: The present one.
        host: Where it runs.
        started: Whether it has its worker.
        generation: Updates that it has done, or been asked to do.
        call: What it is busy with; None: nothing.
        deaths: Of actors here, since the last result.
    """

    number: int
    actor: Any = None
    host: str = "?"
    started: bool = False
    generation: int = 0
    call: Call | None = None
    deaths: int = 0

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
            self._health_actor: Any = None  # the one that has measured a member of this generation
            self.slots = [Slot(number) for number in range(self.count)]
            for slot in self.slots:
                self._start_actor(slot)
        except BaseException:
            self.close()
            raise

    # --- what a Trainer asks ------------------------------------------------------------------------------------------

    def start(self) -> dict[str, Any]:
        while not all(slot.started for slot in self.slots):
            self._wait()
        assert self._start is not None  # of the first that has started
        return self._start

    def fast_forward(self, generations: Sequence[Row], snapshots: Path | None = None) -> None:
        """The actors do it when they are first asked for something: all at once, and a slow one holds nobody up."""
        self._log, self._snapshots = list(generations), None if snapshots is None else snapshots.resolve()

    def evaluate(
        self, generation: int, known: dict[int, Row], keep: Callable[[Row], None], with_health: bool = False
    ) -> tuple[list[Row], list[int]]:
        lines = dict(known)
        self._health_actor = None

        left = self.plan.left(known)
        size = self.plan.group(self.count)
        groups = [left[start : start + size] for start in range(0, len(left), size)]

        def ask(slot: Slot, group: int) -> Any:
            measures = with_health and self._health_actor is None
            if measures:
                self._health_actor = slot.actor
            return slot.actor.members.remote(generation, groups[group], measures)

        def take(group: int, new: list[Row]) -> None:
            for line in new:
                keep(line)
                lines[line["member"]] = line

        dispatch = Dispatch(range(len(groups)), self._limit, self._drop)
        self._spread(dispatch, ask, take)
        dropped = [member for group in dispatch.dropped for member in groups[group]]
        return [lines[member] for member in sorted(lines)], sorted(dropped)

    def update(self, update: Update, with_health: bool = False) -> dict[str, Any]:
        """All actors that are free do it now, at the same time. One that is late with a member, or new, repeats it from
        the log before its next work."""
        results: dict[str, dict[str, Any]] = {}  # by the workers' names
        outcome: dict[str, Any] | None = None  # of the worker that measures health, else of the first
        calls: list[Call] = []

        def take(slot: Slot, measures: bool, result: dict[str, Any]) -> None:
            nonlocal outcome
            if len(self._log) > update.generation:  # the others went on without this one, which proves itself now
                _require_logged(slot.name, result, self._log[update.generation])
                return
            results[slot.name] = result
            outcome = result if outcome is None or measures else outcome

        while True:
            self._catch_up_and_replace()
            for slot in self._ready():
                slot.generation += 1
                measures = with_health and slot.actor == self._health_actor
                reference = slot.actor.update.remote(update, measures)
                slot.call = Call(reference, functools.partial(take, slot, measures), limit=self._limit)
                calls.append(slot.call)
            pending = [slot.call for slot in self.slots if slot.call in calls]
            late = self._limit and pending and time.monotonic() - min(call.since for call in pending) > self._limit
            if outcome is not None and (late or not pending):
                break
            self._wait(self._limit)
        outcome = require_agreement(update, results, outcome)
        self._log.append(Generation.after(update, outcome).to_json())
        return outcome

    def answer_held_out(self) -> Evaluation:
        answered: dict[int, Evaluation] = {}
        questions = len(self.plan.held_out)
        parts = min(self.count, questions)
        # The limit is one of a member; a part has more questions, or fewer.
        longer = max(1.0, questions / parts / (self.plan.prompts or len(self.task.train)))
        limit = None if reads(self.task) else self._limit  # whose members write nothing
        dispatch = Dispatch(range(parts), limit and limit * longer)
        self._spread(dispatch, lambda slot, part: slot.actor.answer_held_out.remote(part, parts), answered.__setitem__)
        return Evaluation.joined([answered[part] for part in range(parts)])

    def stop(self) -> None:
        """Actors only do what they are told."""

    def save_model(self, folder: Path) -> None:
        """Written by one of the workers: ValueError where that is not this machine and the folder is not shared."""
        folder = folder.resolve()
        self._spread(Dispatch([0]), lambda slot, _: slot.actor.save_model.remote(folder), lambda *_: None)
        if not folder.is_dir():
            raise UserError(
                f"the model was written to {folder} on another machine of the cluster: use a shared folder, or "
                "--save_model false and es-finetune export, which needs the log alone"
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

    # --- actors -------------------------------------------------------------------------------------------------------

    def _spread(self, dispatch: Dispatch, ask: Callable[[Slot, int], Any], take: Callable[[int, Any], None]) -> None:
        """Have every job of the dispatch done by some actor, whatever becomes of others. `take` gets the first result
        of each."""

        def on_result(job: int, result: Any) -> None:
            if dispatch.done(job):  # not of one that came too late, when the dispatch may be over
                take(job, result)

        while True:
            self._catch_up_and_replace()
            dispatch.give_up(time.monotonic())
            for slot in self._ready():
                job = dispatch.next(slot.number, time.monotonic())
                if job is not None:
                    slot.call = Call(
                        ask(slot, job),
                        functools.partial(on_result, job),
                        functools.partial(dispatch.lost, slot.number),
                        dispatch.limit,
                    )
            if dispatch.finished:
                return
            # Who would take a member that gets late: without anyone free there is nothing to wake up for.
            due = dispatch.overdue() if dispatch.drop or self._ready() else None
            self._wait(None if due is None else due - time.monotonic())

    def _ready(self) -> list[Slot]:
        """The actors that have nothing to do and all updates done."""
        return [slot for slot in self.slots if slot.call is None and slot.generation == len(self._log)]

    def _catch_up_and_replace(self) -> None:
        """Bring free actors to the log's end, and replace those that hang."""
        for slot in self.slots:
            if slot.call is None and slot.generation < len(self._log):
                behind = self._log[slot.generation :]
                snapshots = self._snapshots if slot.generation == 0 else None
                slot.generation = len(self._log)
                slot.call = Call(slot.actor.fast_forward.remote(behind, snapshots), on_result=lambda _: None)
            elif slot.call is not None and time.monotonic() > slot.call.hangs_at:
                limit = f"the straggler limit of {slot.call.limit:g} s"
                self._replace(slot, f"it took more than {_HANGS} times {limit}")

    def _wait(self, timeout: float | None = None) -> None:
        """Wait until one of the actors comes back with something, and hand that on; at most `timeout` seconds, or until
        one dies or hangs."""
        busy = {call.reference: (slot, call) for slot in self.slots if (call := slot.call) is not None}
        until = min(call.hangs_at for _, call in busy.values()) - time.monotonic()
        until = min(until, math.inf if timeout is None else timeout)
        ready, _ = self.ray.wait(list(busy), num_returns=1, timeout=None if until == math.inf else max(0.05, until))
        if not ready:
            return
        slot, call = busy[ready[0]]
        try:
            result = self.ray.get(ready[0])
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, (ValueError, OSError, RunError)):
                slot.call = None
                raise error.cause from None  # it would be the same on any other
            return self._replace(slot, first_line(error.cause))
        except self.ray.exceptions.RayError as error:
            return self._replace(slot, first_line(error))
        slot.call = None
        if slot.started:
            slot.deaths = 0
        call.on_result(result)

    def _start_actor(self, slot: Slot) -> None:
        slot.actor = self.ray.remote(Actor).options(**self._resources).remote(self._make_worker)
        slot.generation, slot.started = 0, False
        slot.call = Call(slot.actor.start.remote(), functools.partial(self._on_started, slot))

    def _on_started(self, slot: Slot, started: dict[str, Any]) -> None:
        slot.started, slot.host = True, started["host"]
        if self._start is None:
            self._start, self.backend, self.parameters = started["start"], started["backend"], started["parameters"]
            self.machine = started["machine"]
        require_same_run(slot.name, started["start"], self._start)

    def _replace(self, slot: Slot, why: str) -> None:
        slot.deaths += 1
        if slot.deaths > _DEATHS:
            raise RunError(f"{slot.name} died {slot.deaths} times without a result in between; at last: {why}")
        if slot.call is not None:
            slot.call.on_lost()
        self._kill_actor(slot)
        self._start_actor(slot)

    def _kill_actor(self, slot: Slot) -> None:
        if slot.actor is not None:
            self.ray.kill(slot.actor)
            slot.actor = slot.call = None


def _require_logged(name: str, result: dict[str, Any], line: Row) -> None:
    """WorkersDiffer unless an update came to the weights of its line in the log."""
    theta, live = (f"{result[key]:016x}" for key in ("theta", "live"))
    if (theta, live) != (line["theta"], line["live"]):
        raise WorkersDiffer(
            f"after generation {line['generation'] + 1} the weights of {name} are not those of the log: theta {theta}, "
            f"live {live}, not theta {line['theta']}, live {line['live']}. Resume the run; if it happens again, look "
            "for faulty memory or different builds"
        )


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
        raise UserError("the Ray cluster has no GPU: say with --ray_workers how many workers compute on its CPUs")
    for what, needed in (("GPU", gpus * count), ("CPU", count)):
        if needed > have.get(what, 0):
            raise UserError(
                f"{count} workers need {needed} {what}s, and the Ray cluster has {have.get(what, 0):g}: lower "
                "--ray_workers, or add machines"
            )
    return count, gpus
