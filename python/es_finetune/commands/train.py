"""`es-finetune train`: a run begun or continued as its flags say, and how to go on where it ended early.

In Python a run is a `Trainer`.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from es_finetune.config import TrainConfig, as_flags, recorded_options
from es_finetune.errors import RewardFailed, RunError, RunStopped, UserError, in_one_line
from es_finetune.monitor.rows import Summary
from es_finetune.runs.log import read_log
from es_finetune.runs.replay import config_of
from es_finetune.trainer import Trainer, follow
from es_finetune.workers import torchrun


class Trained(NamedTuple):
    """What `train` came to."""

    folder: Path
    summary: Summary  # what summary.json holds


def train(options: Mapping[str, Any], callbacks: Iterable[Any] = ()) -> Trained | None:
    """Begin the run that `options` ask for, or with `resume` go on with the one in the folder `output`.

    Args:
        options: Fields of TrainConfig, by name. With `resume` the run's log fills in what is not given.
        callbacks: As for `Trainer`.

    Returns:
        Folder and summary; None on a rank of torchrun other than the first.

    Raises:
        UserError: The run cannot begin. Nothing of an older one has been changed.
        RunStopped: It began, and ended before its end. What stopped it is chained.
    """
    config = _config_of(options)
    if not torchrun.is_first_rank():
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # the first rank shows what is downloaded
        try:
            follow(config)
        except RunError as error:
            raise RunStopped(in_one_line(error)) from error
        return None
    trainer = Trainer(config, callbacks=callbacks)
    done = trainer.generation
    try:
        return Trained(trainer.folder, trainer.train())
    except (Exception, KeyboardInterrupt) as error:
        refused = isinstance(error, UserError) and trainer.generation == done  # by a tracker, or for another process
        if refused or not trainer.begun:
            raise
        raise RunStopped(_how_to_go_on(trainer, error)) from error


def _config_of(options: Mapping[str, Any]) -> TrainConfig:
    """What is given, over the config of the log where a run is resumed. Trainer refuses what would make it another."""
    if not options.get("resume"):
        return TrainConfig(**options)
    if options.get("output") is None:
        raise UserError("--resume continues the run in a folder: give it with --output")
    folder = Path(options["output"])
    header, _ = read_log(folder / "run.log")
    return dataclasses.replace(config_of(header, folder), **options)


def _how_to_go_on(trainer: Trainer, error: BaseException) -> str:
    words = "stopped" if isinstance(error, KeyboardInterrupt) else in_one_line(error)
    if isinstance(error, RewardFailed) and not (trainer.generation or trainer.members):
        return f"{words}. Nothing is kept yet: mend the reward, and begin again with --overwrite"
    members = f" and {_counted(trainer.members, 'member')}" if trainer.members else ""
    kept = f"{_counted(trainer.generation, 'generation')}{members} are kept in {trainer.folder}"
    header, _ = read_log(trainer.folder / "run.log")
    begun, now = (recorded_options(config) for config in (config_of(header, trainer.folder), trainer.config))
    flags = as_flags({name: value for name, value in now.items() if value != begun[name]})
    command = shlex.join(["es-finetune", "train", "--resume", "--output", trainer.config.output, *flags])
    how = "the same torchrun, and --resume" if torchrun.under_torchrun() else command
    return f"{words}. {kept}; continue with: {how}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
