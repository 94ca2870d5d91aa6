"""Scalars of a run sent to TensorBoard, W&B or trackio.

What goes wrong before the run is an error (a name nobody knows, a package that is missing, a login that is refused);
what goes wrong during it is a warning, once: no tracker may end a run of hours.
"""

from __future__ import annotations

import importlib
import os
import uuid
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from es_finetune.config import TRACKERS
from es_finetune.errors import UserError


def require(report_to: Sequence[str]) -> None:
    """ValueError unless every name is a tracker whose package can be imported."""
    for name in report_to:
        if name not in TRACKERS:
            raise UserError(f"unknown tracker {name!r} in report_to; choose from: {', '.join(TRACKERS)}")
        if name != "none":
            _load(name)
    if "none" in report_to and len(report_to) > 1:
        raise UserError(
            f"report_to holds none beside {next(name for name in report_to if name != 'none')}: give one or the other"
        )


class Tracker:
    """`report_to`: names of TRACKERS. `folder`: of the run; its name is the run's name, and TensorBoard's events go to
    its tensorboard/.

    `done`: updates already done, of a run that goes on; what was logged after them is dropped from TensorBoard's
    curves. W&B keeps the run's id in the folder and continues it; trackio continues the run of this name.
    """

    def __init__(self, report_to: Sequence[str], folder: str | Path, config: dict[str, Any], done: int = 0):
        require(report_to)
        self._open: list[_TensorBoard | _Hosted] = []
        self._warned: set[str] = set()
        for name in report_to:
            if name == "none":
                continue
            make = _TensorBoard if name == "tensorboard" else _Hosted
            try:
                self._open.append(make(name, Path(folder), config, done))
            except Exception as error:  # a refused login, a folder that cannot be written
                self.close()
                raise UserError(
                    f"{name} could not be started: {_line(error)}; take it out of report_to or put that right"
                ) from error

    def log(self, row: dict[str, Any], step: int, prefix: str = "train") -> None:
        """Every number of `row`, nested ones too, under `prefix`/its name. `step`: updates done, which may only
        grow."""
        values = dict(scalars(row, prefix))
        for tracker in self._open:
            self._try(tracker, tracker.log, values, step)

    def close(self) -> None:
        for tracker in self._open:
            self._try(tracker, tracker.close)
        self._open = []

    def _try(self, tracker: _TensorBoard | _Hosted, do: Any, *arguments: Any) -> None:
        try:
            do(*arguments)
        except Exception as error:
            if tracker.name not in self._warned:
                self._warned.add(tracker.name)
                warnings.warn(f"{tracker.name} failed, the run goes on without: {_line(error)}", stacklevel=3)


def scalars(row: dict[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """The numbers of a row, by path: {"health": {"drift": 1.0}} gives prefix/health/drift. A pair [name, number] gives
    its number, any other list each of its numbers, under its place: prefix/health/correlation/w/0 and /1."""
    for key, found in row.items():
        if isinstance(found, (list, tuple)):
            found = (
                found[1]
                if len(found) == 2 and isinstance(found[0], str)
                else {str(place): part for place, part in enumerate(found)}
            )
        if isinstance(found, dict):
            yield from scalars(found, f"{prefix}/{key}")
        elif isinstance(found, (int, float)):  # true and false are 1 and 0
            yield f"{prefix}/{key}", found


class _TensorBoard:
    def __init__(self, name: str, folder: Path, config: dict[str, Any], done: int):
        from torch.utils.tensorboard import SummaryWriter

        self.name = name
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1 if done else None)
        if not done:
            self.writer.add_text("config", "\n".join(f"    {key}: {found}" for key, found in config.items()))

    def log(self, values: dict[str, float], step: int) -> None:
        for name, number in values.items():
            self.writer.add_scalar(name, number, step)
        self.writer.flush()  # a queue of its own would be lost with a killed run

    def close(self) -> None:
        self.writer.close()


class _Hosted:
    """wandb and trackio: one interface, wandb's."""

    def __init__(self, name: str, folder: Path, config: dict[str, Any], done: int):
        self.name, self.module = name, _load(name)
        options = {
            "project": os.environ.get(f"{name.upper()}_PROJECT", "es-finetune"),
            "name": folder.resolve().name,
            "config": config,
        }
        options["resume"] = "allow" if done else "never"
        if name == "wandb":  # knows a run by its id only
            kept = folder / "wandb-id"
            if not done or not kept.exists():
                kept.write_text(uuid.uuid4().hex)
            options |= {"id": kept.read_text(), "dir": str(folder)}
        self.module.init(**options)

    def log(self, values: dict[str, float], step: int) -> None:
        self.module.log(values, step=step)

    def close(self) -> None:
        self.module.finish()


def _load(name: str) -> Any:
    try:
        return importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError:
        raise UserError(f"report_to names {name}, which is not installed: pip install {name}, or take it out") from None


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
