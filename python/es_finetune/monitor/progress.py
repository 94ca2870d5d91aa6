"""What is shown of a run on a terminal, in a file or a pipe: its messages and its progress."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import TextColumn
from rich.table import Column

from es_finetune.monitor.callbacks import Callback, Run
from es_finetune.monitor.rows import EvalRow, GenerationRow, Summary, total_seconds


def value(metric: str, number: float | None) -> str:
    """`exact` in percent, `reward` as a number of about four digits, `?` where it was not measured."""
    if number is None:
        return "?"
    if metric == "exact":
        return f"{number:.1%}"
    return f"{number:.3f}" if abs(number) < 10 else f"{number:.1f}" if abs(number) < 10_000 else f"{number:.3g}"


def duration(seconds: float) -> str:
    """At most seven characters up to 9,999 hours."""
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    if seconds < 119.5 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 100 * 3600 else f"{seconds / 3600:.0f} h"


def estimate(seconds: float, eval_seconds: float, generations: int, eval_every: int) -> str:
    """How long a whole run takes, in words.

    Args:
        seconds: Of a generation.
        eval_seconds: Of an eval on the held-out prompts.
        generations: Of the run.
        eval_every: Generations between evals; 0: only the first and the last.
    """
    each = f"{seconds:.1f} s" if seconds < 120 else duration(seconds)
    evals = 2 + ((generations - 1) // eval_every if eval_every else 0)
    return (
        f"{duration(seconds * generations + eval_seconds * evals)} for {generations} generations of {each} and "
        f"{evals} evals on the held-out prompts of {eval_seconds:.1f} s"
    )


@functools.cache
def terminal(stderr: bool = False) -> Console:
    """Where messages and the live line go, one above the other: standard output, or with `stderr` standard error;
    without colours of numbers."""
    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def is_live(console: Console) -> bool:
    """Whether a line can change in place there: a terminal, or a notebook with ipywidgets, with which rich draws it."""
    return console.is_terminal or (console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None)


class _Messages(logging.Handler):
    """Prints the text of each message as a line above the live one."""

    def __init__(self, console: Console):
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        try:
            # On a terminal broken between words
            self.console.print(self.format(record), markup=False, highlight=False, soft_wrap=not is_live(self.console))
        except Exception:  # as every handler of logging: a message is worth no run
            self.handleError(record)


@contextmanager
def show_messages(console: Console, level: int = logging.INFO) -> Iterator[None]:
    """Print what es_finetune has to say, from `level` on, as plain lines on this console."""
    logger, handler = logging.getLogger("es_finetune"), _Messages(console)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


class Progress(Callback):
    """Draws the progress of a run: a live line on a terminal, a plain line every few generations in a file or a pipe.

    Args:
        console: That of `show_messages`, or messages would break the live line.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or terminal()
        self.live = is_live(self.console)

    def on_start(self, trainer: Run) -> None:
        # One column of text under 80 characters: a bar beside it would push the count off a narrow terminal. Narrower
        # still, its end is cut.
        text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
        self.bar = Bar(text, console=self.console, disable=not self.live)
        self.first: tuple[int, float] | None = None  # generations and seconds when the first one here was done
        # What the live line says of the generations done, in short and in full
        self.latest = self.line = f"{trainer.generation}/{trainer.config.generations}"
        self.row = self.bar.add_task(self.latest, total=trainer.config.generations)
        self.bar.start()

    def on_activity(self, trainer: Run, doing: str) -> None:
        """On the live line, behind what the generations came to."""
        self.bar.update(self.row, description=f"{self.latest}  {doing}")

    def on_eval(self, trainer: Run, row: EvalRow) -> None:
        self.bar.update(self.row, description=self.line)

    def on_generation(self, trainer: Run, row: GenerationRow) -> None:
        done, generations, metric = row["generation"] + 1, trainer.config.generations, trainer.task.metric
        seconds = total_seconds(trainer.rows, trainer.evals)
        # Evals between generations count, what came before the first one does not.
        first, then = self.first = self.first or (done, seconds)
        each = (seconds - then) / (done - first) if done > first else row["seconds"]
        last: Mapping[str, Any] = trainer.evals[-1]
        held_out = value(metric, last[metric])
        self.latest = (
            f"{done:{len(str(generations))}d}/{generations}  reward {value('reward', row['reward_mean'])}  "
            f"held-out {held_out if metric == 'reward' else f'{metric} {held_out}'}  "
            f"{duration(seconds)}, {duration(each * (generations - done))} left"
        )
        self.line = f"{self.latest}  outside {row['share_outside']:.1%}"
        self.bar.update(self.row, completed=done, description=self.line)
        if not self.live and (done % max(1, generations // 10) == 0 or done == 1):
            self.console.print(self.line, markup=False, highlight=False, soft_wrap=True)

    def on_end(self, trainer: Run, summary: Summary | None) -> None:
        self.bar.stop()
