"""A pool of Ray actors as workers. Members go out one at a time; an actor that dies is replaced, and the new one repeats the log.

The driver holds no weights: log, scores and questions only. What it keeps of a generation (run.log, journal) is all that a run needs to go on.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from es_finetune.config import TrainConfig
from es_finetune.errors import require
from es_finetune.evaluation.evaluator import Evaluation
from es_finetune.models.load import first_line
from es_finetune.monitor.rows import Row
from es_finetune.optim.evolution_strategy import Update
from es_finetune.runs.setup import make_task
from es_finetune.workers.dispatch import Dispatch
from es_finetune.workers.protocol import WorkersDiffer, refuse_other, refuse_unshared, together
from es_finetune.workers.worker import RewardFailed, Worker, checked, held_out_items, line_of, missing

# After so many deaths without a single result in between, something else is wrong than a machine.
_DEATHS = 3
# A worker that takes so many times the limit hangs, and is replaced.
_HANGS = 3


class Actor:
    """A worker in a process of its own. What it is asked comes with the number of the generation that it must be at."""

    def __init__(self, config: dict[str, Any]):
        self.config = config

    def start(self) -> dict[str, Any]:
        self.worker = Worker(TrainConfig(**self.config))  # not in the constructor, whose errors Ray reports as a death
        start = self.worker.start()
        return {"start": start, "host": socket.gethostname(), "backend": self.worker.backend, "parameters": self.worker.parameters}

    def fast_forward(self, generations: Sequence[Row], snapshots: Path | None) -> None:
        self.worker.fast_forward(generations, snapshots)

    def member(self, generation: int, member: int, looking: bool) -> Row:
        (line,) = self.worker.run(generation, [member], lambda line: None, looking)
        return line

    def update(self, update: Update, looking: bool) -> dict[str, Any]:
        return self.worker.update(update, looking)

    def answer_held_out(self, part: int, parts: int) -> Evaluation:
        return self.worker.answer_held_out(part, parts)

    def save_model(self, folder: Path) -> None:
        self.worker.save_model(folder)

    def save_snapshot(self, folder: Path) -> None:
        self.worker.save_snapshot(folder)


@dataclasses.dataclass
class _Place:
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


class RayPool:
    """The workers of a run in a Ray cluster: the one that RAY_ADDRESS names or that was started on this machine, else one of this process.

    config.ray_workers actors, by default one for each GPU (each config.tensor_parallel GPUs); model and task are loaded in each of them.
    """

    model = None  # it is in the actors

    def __init__(self, config: TrainConfig):
        refuse_unshared(config)
        self.ray = _ray()
        self.config, self.task = config, checked(make_task(config), config)
        self._own = _connect(self.ray)
        try:
            self.count, gpus = _capacity(self.ray, config)
            self._options = {"num_gpus": gpus, "num_cpus": 1, "max_restarts": 0, "max_task_retries": 0}
            self._asked = {**dataclasses.asdict(config), **_absolute(config), "resume": False, "overwrite": False, "workers": "alone"}
            self._log: list[Row] = []  # lines of the generations done, which a new actor repeats
            self._snapshots: Path | None = None
            self._start: dict[str, Any] | None = None
            self._limit = config.straggler_limit or None
            self._looker: Any = None  # the actor that has looked at a member of this generation
            self.places = [_Place(number) for number in range(self.count)]
            for place in self.places:
                self._hire(place)
        except BaseException:
            self.close()
            raise

    # --- what a Trainer asks -------------------------------------------------------------------------------------------

    def start(self) -> dict[str, Any]:
        while any(place.what == ("start",) for place in self.places):
            self._wait(None)
        return self._start

    def fast_forward(self, generations: Sequence[Row], snapshots: Path | None = None) -> None:
        """The actors do it when they are first asked for something: all at once, and a slow one holds nobody up."""
        self._log, self._snapshots = list(generations), None if snapshots is None else snapshots.resolve()

    def evaluate(self, generation: int, known: dict[int, Row], keep: Callable[[Row], None], looking: bool = False) -> tuple[list[Row], list[int]]:
        lines = dict(known)

        def take(member: int, line: Row) -> None:
            keep(line)
            lines[member] = line

        self._looker = None

        def ask(place: _Place, member: int) -> Any:
            look = looking and self._looker is None
            if look:
                self._looker = place.actor
            return place.actor.member.remote(generation, member, look)

        dispatch = Dispatch(missing(self.config, known), self._limit, self.config.on_straggler == "drop")
        self._spread(dispatch, ask, take)
        return [lines[member] for member in sorted(lines)], sorted(dispatch.dropped)

    def update(self, update: Update, looking: bool = False) -> dict[str, Any]:
        found: dict[str, dict[str, Any]] = {}
        one = None
        # All that are free do it now, at the same time; who is late with a member, or new, repeats it from the log before its next work.
        while True:
            self._tend()
            for place in self._ready():
                place.generation += 1
                look = looking and place.actor == self._looker
                self._ask(place, ("update", look), place.actor.update.remote(update, look), self._limit)
            pending = [place for place in self.places if place.what[:1] == ("update",)]
            if found and (not pending or (self._limit and time.monotonic() - min(place.since for place in pending) > self._limit)):
                break
            for place, what, result in self._wait(self._limit):
                if what[0] == "update":
                    found[place.name] = result
                    one = result if one is None or what[1] else one
        one = together(update, found, one)
        self._log.append(line_of(update, one))
        return one

    def answer_held_out(self) -> Evaluation:
        found: dict[int, Evaluation] = {}
        questions = len(held_out_items(self.task, self.config))
        parts = min(self.count, questions)
        # The limit is one of a member; a part has more questions, or fewer.
        longer = max(1.0, questions / parts / (self.config.prompts or len(self.task.train)))
        dispatch = Dispatch(range(parts), self._limit and self._limit * longer)
        self._spread(dispatch, lambda place, part: place.actor.answer_held_out.remote(part, parts), found.__setitem__)
        return Evaluation.joined([found[part] for part in range(parts)])

    def save_model(self, folder: Path) -> None:
        """Written by one of the workers: ValueError where that is not this machine and the folder is not shared."""
        folder = folder.resolve()
        self._spread(Dispatch([0]), lambda place, _: place.actor.save_model.remote(folder), lambda *_: None)
        if not folder.is_dir():
            raise ValueError(
                f"the model was written to {folder} on another machine of the cluster: use a shared folder, or --save_model false and es-finetune export, "
                "which needs the log alone"
            )

    def save_snapshot(self, folder: Path) -> None:
        folder = folder.resolve()
        self._snapshots = folder
        self._spread(Dispatch([0]), lambda place, _: place.actor.save_snapshot.remote(folder), lambda *_: None)

    def close(self) -> None:
        for place in getattr(self, "places", ()):
            self._dismiss(place)
        if self._own:
            self.ray.shutdown()

    # --- actors ----------------------------------------------------------------------------------------------------------

    def _spread(self, dispatch: Dispatch, ask: Callable[[_Place, int], Any], take: Callable[[int, Any], None]) -> None:
        """Have every job of the dispatch done by some actor, whatever becomes of others. `take` gets the first result of each."""
        spread = object()  # results of another are too late
        while True:
            self._tend(dispatch)
            dispatch.give_up(time.monotonic())
            for place in self._ready():
                job = dispatch.next(place.number, time.monotonic())
                if job is not None:
                    self._ask(place, ("job", spread, job), ask(place, job), dispatch.limit)
            if dispatch.finished:
                return
            # Who would take a member that gets late: without anyone free there is nothing to wake up for.
            due = dispatch.overdue() if dispatch.drop or self._ready() else None
            for place, what, result in self._wait(None if due is None else due - time.monotonic(), dispatch):
                if what[0] == "job" and what[1] is spread and dispatch.done(what[2]):
                    take(what[2], result)
                elif what[0] == "update":  # of one that was late with it
                    done = self._log[place.generation - 1]
                    proof = {key: int(done[key], 16) for key in ("theta", "live")}
                    together(Update(done["generation"], 0.0, 0, None), {"the log": {**result, **proof}, place.name: result}, result)

    def _ready(self) -> list[_Place]:
        """The actors that have nothing to do and all updates done."""
        return [place for place in self.places if place.call is None and place.generation == len(self._log)]

    def _ask(self, place: _Place, what: tuple, call: Any, limit: float | None = None) -> None:
        place.call, place.what, place.since, place.limit = call, what, time.monotonic(), limit

    def _tend(self, dispatch: Dispatch | None = None) -> None:
        """Bring free actors to the log's end, and replace those that hang."""
        for place in self.places:
            if place.call is None and place.generation < len(self._log):
                behind = self._log[place.generation :]
                snapshots = self._snapshots if place.generation == 0 else None
                place.generation = len(self._log)
                self._ask(place, ("catch up",), place.actor.fast_forward.remote(behind, snapshots))
            elif place.call is not None and place.limit and time.monotonic() - place.since > _HANGS * place.limit:
                self._replace(place, f"it took more than {_HANGS} times the straggler limit of {place.limit:g} s", dispatch)

    def _wait(self, timeout: float | None, dispatch: Dispatch | None = None) -> list[tuple[_Place, tuple, Any]]:
        """What one of the actors came back with, as (place, what it was asked, result); nothing after `timeout` seconds, or where one died or
        hangs."""
        calls = {place.call: place for place in self.places if place.call is not None}
        now = time.monotonic()
        waits = [place.since + _HANGS * place.limit - now for place in calls.values() if place.limit] + ([] if timeout is None else [timeout])
        ready, _ = self.ray.wait(list(calls), num_returns=1, timeout=max(0.05, min(waits)) if waits else None)
        if not ready:
            return []
        place = calls[ready[0]]
        what, place.call, place.what = place.what, None, ()
        try:
            result = self.ray.get(ready[0])
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, (ValueError, OSError, RewardFailed, WorkersDiffer)):
                raise error.cause from None  # it would be the same on any other
            self._replace(place, first_line(error.cause), dispatch)
            return []
        except self.ray.exceptions.RayError as error:
            self._replace(place, first_line(error), dispatch)
            return []
        if what[0] == "start":
            self._begun(place, result)
        else:
            place.deaths = 0
        return [(place, what, result)]

    def _hire(self, place: _Place) -> None:
        place.actor = self.ray.remote(Actor).options(**self._options).remote(self._asked)
        place.generation = 0
        self._ask(place, ("start",), place.actor.start.remote())

    def _begun(self, place: _Place, found: dict[str, Any]) -> None:
        place.host = found["host"]
        if self._start is None:
            self._start, self.backend, self.parameters = found["start"], found["backend"], found["parameters"]
        refuse_other(place.name, found["start"], self._start)

    def _replace(self, place: _Place, why: str, dispatch: Dispatch | None) -> None:
        place.deaths += 1
        if place.deaths > _DEATHS:
            raise RuntimeError(f"{place.name} died {place.deaths} times without a result in between; at last: {why}")
        if dispatch is not None:
            dispatch.lost(place.number)
        self._dismiss(place)
        self._hire(place)

    def _dismiss(self, place: _Place) -> None:
        if place.actor is not None:
            self.ray.kill(place.actor)
            place.actor = place.call = None


def _absolute(config: TrainConfig) -> dict[str, str]:
    """The paths of a config, which an actor may look for from another folder."""
    found = {"output": str(Path(config.output).resolve())}
    for name in ("model", "data", "test_data"):
        value = getattr(config, name)
        if value and Path(value).exists():
            found[name] = str(Path(value).resolve())
    if config.reward and Path(config.reward.rpartition(":")[0]).is_file():
        file, _, function = config.reward.rpartition(":")
        found["reward"] = f"{Path(file).resolve()}:{function}"
    return found


def _ray():
    require("workers 'ray'", "ray", "ray")
    import ray

    return ray


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
        raise ValueError(f"the Ray cluster {address or 'of this machine'} cannot be reached: {first_line(error)}") from None
    return True


def _capacity(ray, config: TrainConfig) -> tuple[int, int]:
    """(workers, GPUs of each). ValueError where the cluster has no room for them."""
    have = ray.cluster_resources()
    gpus = config.tensor_parallel if have.get("GPU") and config.device != "cpu" else 0
    count = config.ray_workers or int(have.get("GPU", 0)) // config.tensor_parallel
    if not count:
        raise ValueError("the Ray cluster has no GPU: say with --ray_workers how many workers shall compute on its CPUs")
    for what, needed in (("GPU", gpus * count), ("CPU", count)):
        if needed > have.get(what, 0):
            raise ValueError(
                f"{count} workers need {needed} {what}s, and the Ray cluster has {have.get(what, 0):g}: lower --ray_workers, or add machines"
            )
    return count, gpus
