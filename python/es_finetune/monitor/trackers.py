"""The numbers of a run, sent to TensorBoard, W&B, trackio or a tracker of accelerate.

What goes wrong before the run is an error (a name nobody knows, a package that is missing, a login that is refused);
what goes wrong during it is a warning, once: no tracker may end a run of hours.
"""

from __future__ import annotations

import importlib
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from es_finetune.config import TRACKERS, recorded_options
from es_finetune.errors import UserError, first_line
from es_finetune.monitor.callbacks import Callback, Run
from es_finetune.monitor.rows import EvalRow, GenerationRow, Summary

logger = logging.getLogger(__name__)


class Tracker(Callback):
    """Sends the numbers of a run to one place: train/NAME of each generation, held_out/NAME of each eval, at the number
    of updates done.

    A subclass has a `name` and says how to `start`, `log` and `finish`. What fails in `start` is a UserError. What
    fails later is one warning, and the run goes on: a network may come back.
    """

    name: str
    remedy = "take it out of report_to or put that right"

    def __init__(self) -> None:
        self._warned = False

    def start(self, folder: Path, config: dict[str, Any], done: int) -> None:
        """Begin, or go on where updates were `done`; the name of `folder` is the run's."""
        raise NotImplementedError

    def log(self, values: dict[str, float], step: int) -> None:
        """Keep these numbers; `step` only grows."""
        raise NotImplementedError

    def finish(self) -> None:
        """No number follows."""
        raise NotImplementedError

    def on_start(self, trainer: Run) -> None:
        try:
            self.start(trainer.folder, recorded_options(trainer.config), trainer.generation)
        except Exception as error:  # a refused login, a folder that cannot be written
            raise UserError(f"{self.name} could not be started: {first_line(error)}; {self.remedy}") from error

    def on_generation(self, trainer: Run, row: GenerationRow) -> None:
        self._try(lambda: self.log(dict(scalars(row, "train")), trainer.generation))

    def on_eval(self, trainer: Run, row: EvalRow) -> None:
        self._try(lambda: self.log(dict(scalars(row, "held_out")), trainer.generation))

    def on_end(self, trainer: Run, summary: Summary | None) -> None:
        self._try(self.finish)

    def _try(self, do: Callable[[], None]) -> None:
        try:
            do()
        except Exception as error:
            if not self._warned:
                self._warned = True
                logger.warning("%s failed, the run goes on without: %s", self.name, first_line(error))


def trackers_named(report_to: Sequence[str]) -> list[Tracker]:
    """A tracker for each name of TRACKERS in `report_to`; nothing is started yet.

    Raises:
        UserError: A name is unknown, its package is not installed, or "none" stands beside another.
    """
    for name in report_to:
        if name not in TRACKERS:
            raise UserError(f"unknown tracker {name!r} in report_to; choose from: {', '.join(TRACKERS)}")
    named = [name for name in report_to if name != "none"]
    if named and "none" in report_to:
        raise UserError(f"report_to holds none beside {named[0]}: give one or the other")
    return [_TensorBoard() if name == "tensorboard" else _Hosted(name) for name in named]


def as_callback(callback: Any) -> Callback:
    """A Callback as it is; of a tracker of accelerate (`accelerate.tracking.GeneralTracker`) the callback that feeds
    it.

    Raises:
        UserError: It is neither.
    """
    if isinstance(callback, Callback):
        return callback
    if isinstance(callback, type) or not all(hasattr(callback, part) for part in ("name", *_GENERAL_TRACKER)):
        what = callback.__name__ if isinstance(callback, type) else type(callback).__name__
        raise UserError(
            f"callbacks holds {what}, which is no {'object' if isinstance(callback, type) else 'Callback'}: "
            "give objects of es_finetune.Callback, or trackers of accelerate"
        )
    return _General(callback)


def scalars(row: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """The numbers of a row, by path: {"health": {"drift": 1.0}} gives prefix/health/drift. A pair [name, number] gives
    its number, any other list each of its numbers, under its place: prefix/health/correlation/w/0 and /1."""
    for key, value in row.items():
        if isinstance(value, (list, tuple)):
            pair = len(value) == 2 and isinstance(value[0], str)
            value = value[1] if pair else {str(place): part for place, part in enumerate(value)}
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}/{key}")
        elif isinstance(value, (int, float)):  # true and false are 1 and 0
            yield f"{prefix}/{key}", value


class _TensorBoard(Tracker):
    """Events in the folder's tensorboard/. Of a run that goes on, what was logged after `done` is dropped from the
    curves."""

    name = "tensorboard"

    def __init__(self) -> None:
        super().__init__()
        _load(self.name)

    def start(self, folder: Path, config: dict[str, Any], done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1 if done else None)
        if not done:
            self.writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in config.items()))

    def log(self, values: dict[str, float], step: int) -> None:
        for name, number in values.items():
            self.writer.add_scalar(name, number, step)
        self.writer.flush()  # a queue of its own would be lost with a killed run

    def finish(self) -> None:
        self.writer.close()


class _Hosted(Tracker):
    """wandb and trackio: one interface, wandb's. W&B keeps the run's id in the folder and continues it; trackio
    continues the run of this name."""

    def __init__(self, name: str):
        super().__init__()
        self.name, self.module = name, _load(name)

    def start(self, folder: Path, config: dict[str, Any], done: int) -> None:
        options = {
            "project": os.environ.get(f"{self.name.upper()}_PROJECT", "es-finetune"),
            "name": folder.resolve().name,
            "config": config,
            "resume": "allow" if done else "never",
        }
        if self.name == "wandb":  # knows a run by its id only
            kept = folder / "wandb-id"
            if not done or not kept.exists():
                kept.write_text(uuid.uuid4().hex)
            options |= {"id": kept.read_text(), "dir": str(folder)}
        self.module.init(**options)

    def log(self, values: dict[str, float], step: int) -> None:
        self.module.log(values, step=step)

    def finish(self) -> None:
        self.module.finish()


# What a tracker of accelerate has beside its name; accelerate itself is not imported.
_GENERAL_TRACKER = ("store_init_configuration", "log", "finish")


class _General(Tracker):
    """A tracker of accelerate, made by the user: it knows project and run, and gets the config and the numbers."""

    remedy = "take it out of callbacks or put that right"

    def __init__(self, tracker: Any):
        super().__init__()
        self.name, self.tracker = str(tracker.name), tracker

    def start(self, folder: Path, config: dict[str, Any], done: int) -> None:
        if hasattr(self.tracker, "start"):  # opens its resources, in newer versions
            self.tracker.start()
        self.tracker.store_init_configuration(
            {name: ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in config.items()}
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self.tracker.log(values, step=step)

    def finish(self) -> None:
        self.tracker.finish()


def _load(name: str) -> Any:
    try:
        return importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError:
        raise UserError(f"report_to names {name}, which is not installed: pip install {name}, or take it out") from None
