"""The hooks of a run: what a Trainer calls while it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from es_finetune.config import TrainConfig
from es_finetune.monitor.rows import EvalRow, GenerationRow, Summary
from es_finetune.tasks import Task


class Run(Protocol):
    """What a callback may read of a Trainer, and how it stops the run.

    Attributes:
        config: What was asked for.
        folder: Of the run.
        task: What is trained on.
        model: The model, whose weights are theta whenever a hook is called; None where it is in other processes.
        generation: Updates done.
        rows: Of metrics.jsonl, one for each of them.
        evals: Rows of evals.jsonl.
    """

    config: TrainConfig
    folder: Path
    task: Task
    model: Any
    generation: int
    rows: list[GenerationRow]
    evals: list[EvalRow]

    def stop(self) -> None:
        """End the run cleanly after the generation in progress: held-out eval, model and summary are written, and it
        can be resumed."""


class Callback:
    """Base class of what a Trainer takes as `callbacks`: override the hooks that you need.

    All run in the process and thread of the Trainer, under torchrun on the first rank alone. An error that a hook
    raises ends the run, which can be resumed. To end it without an error call `trainer.stop()`.
    """

    def on_start(self, trainer: Run) -> None:
        """The run begins, or goes on where `trainer.generation` is not 0.

        Model and task are loaded and checked. Nothing in the folder has been changed: an error here leaves an older run
        as it was, also with `overwrite`.

        Args:
            trainer: The Trainer.
        """

    def on_activity(self, trainer: Run, doing: str) -> None:
        """The run turns to something else, at least once for each member.

        Args:
            trainer: The Trainer.
            doing: What it is at, in a few words for a display: "member 7/30".
        """

    def on_generation(self, trainer: Run, row: GenerationRow) -> None:
        """A generation is done and in the log.

        Args:
            trainer: The Trainer.
            row: Its line of metrics.jsonl.
        """

    def on_eval(self, trainer: Run, row: EvalRow) -> None:
        """The held-out questions were answered.

        Args:
            trainer: The Trainer.
            row: The line of evals.jsonl.
        """

    def on_end(self, trainer: Run, summary: Summary | None) -> None:
        """The run is over, whatever ended it: close here what `on_start` opened.

        Args:
            trainer: The Trainer.
            summary: What summary.json holds; None where an error or Ctrl-C broke the run off.
        """
