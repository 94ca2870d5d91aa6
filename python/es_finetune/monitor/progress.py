"""The progress of a run on a terminal: one live line; in a file or a pipe: one plain line every few generations."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import TextColumn
from rich.table import Column


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


def terminal() -> Console:
    """Where messages and the live line go: standard output, without colours of numbers."""
    return Console(highlight=False, soft_wrap=True)


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


class Progress:
    """Use as a context manager; `update` after every generation. `metric`: the headline on held-out items, exact or
    reward. `done`: generations that an earlier process did."""

    def __init__(self, generations: int, metric: str = "exact", console: Console | None = None, done: int = 0):
        self.generations, self.metric = generations, metric
        self.console = console or Console(highlight=False, soft_wrap=True)
        # In a notebook rich draws its live line with ipywidgets; without them it would only complain.
        self.live = self.console.is_terminal or (
            self.console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
        )
        # One column of text under 80 characters: a bar beside it would push the count off a narrow terminal. Narrower
        # still, its end is cut.
        text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
        self.bar = Bar(text, console=self.console, disable=not self.live)
        # What the live line says of the generations done, in short and in full
        self.latest = self.line = f"{done}/{generations}"
        self.row = self.bar.add_task(self.latest, total=generations)
        self.first: tuple[int, float] | None = None

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self.bar.stop()

    def note(self, text: str) -> None:
        """A line that stays: a warning, an estimate, an eval on the held-out items."""
        # On a terminal broken between words
        self.console.print(text, markup=False, highlight=False, soft_wrap=not self.live)

    def now(self, text: str) -> None:
        """What is being done, on the live line behind what the generations came to."""
        self.bar.update(self.row, description=f"{self.latest}  {text}")

    def rest(self) -> None:
        """It is done."""
        self.bar.update(self.row, description=self.line)

    def member(self, number: int, population: int, seconds: float) -> None:
        """After each member of a generation, which will take so many seconds in all."""
        about = "" if self.first else f", generation about {duration(seconds)}"  # until the line has the time left
        self.now(f"member {number}/{population}{about}")

    def update(self, row: dict[str, Any], held_out: float | None, seconds: float) -> None:
        """`row`: the generation's metrics; `held_out`: the latest headline on held-out items; `seconds`: since this
        process began the run."""
        done = row["generation"] + 1
        # Looks at the held-out items between generations count, what came before the first one does not.
        first, then = self.first = self.first or (done, seconds)
        each = (seconds - then) / (done - first) if done > first else row["seconds"]
        held = (
            value(self.metric, held_out) if self.metric == "reward" else f"{self.metric} {value(self.metric, held_out)}"
        )
        self.latest = (
            f"{done:{len(str(self.generations))}d}/{self.generations}  reward {value('reward', row['reward_mean'])}  "
            f"held-out {held}  {duration(seconds)}, {duration(each * (self.generations - done))} left"
        )
        self.line = f"{self.latest}  outside {row['share_outside']:.1%}"
        self.bar.update(self.row, completed=done, description=self.line)
        if not self.live and (done % max(1, self.generations // 10) == 0 or done == 1):
            self.note(self.line)
