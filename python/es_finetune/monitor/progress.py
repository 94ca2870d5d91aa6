"""What is shown of a run on a terminal, in a file or a pipe: its messages and its progress."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rich.progress
from rich.cells import cell_len, set_cell_size
from rich.console import Console, RenderableType
from rich.progress import BarColumn, TextColumn
from rich.table import Column
from rich.text import Text

from es_finetune.monitor.callbacks import Callback, Run
from es_finetune.monitor.rows import EvalRow, GenerationRow, Summary, total_seconds
from es_finetune.runs.files import read_rows


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


def terminal(stderr: bool = False) -> Console:
    """Where messages and the live view go, one above the other: standard output, or with `stderr` standard error;
    without colours of numbers. One object for each: only a message of the same console moves the live view down."""
    return _console(stderr)


@functools.cache
def _console(stderr: bool) -> Console:
    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def say(text: str, console: Console) -> None:
    """A line as it is; on a terminal broken between words."""
    console.print(text, markup=False, highlight=False, soft_wrap=not is_live(console))


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
            say(self.format(record), self.console)
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


class _View(rich.progress.Progress):
    """A bar and lines of text below it."""

    lines: Sequence[str] = ("", "")  # results, sample, and what is being done

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        # The console's soft_wrap would let the terminal break a long one inside a word
        yield from (Text(line, no_wrap=False, overflow="fold") for line in self.lines if line)


class Progress(Callback):
    """Draws the progress of a run: on a terminal a live view of a bar, the rewards, what is being done and a sample
    answer; in a file or a pipe a plain line every few generations, and the sample answer below it.

    Args:
        console: That of `show_messages`, or messages would break the live view.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or terminal()
        self.live = is_live(self.console)

    def on_start(self, trainer: Run) -> None:
        self.view = _View(
            BarColumn(bar_width=None),
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            console=self.console,
            disable=not self.live,
            expand=True,
        )
        self.first: tuple[int, float] | None = None  # generations and seconds when the first one here was done
        self.sample = self.shown = ""
        self.row = self.view.add_task(
            f"{trainer.generation}/{trainer.config.generations}",
            total=trainer.config.generations,
            completed=trainer.generation,
        )
        self.view.start()

    def on_activity(self, trainer: Run, doing: str) -> None:
        self.view.lines = [*self.view.lines[:2], doing]

    def on_eval(self, trainer: Run, row: EvalRow) -> None:
        self.sample = _sample(trainer.folder, row["generation"], len(trainer.evals) - 1)
        self._show(trainer)

    def on_generation(self, trainer: Run, row: GenerationRow) -> None:
        done, generations = row["generation"] + 1, trainer.config.generations
        seconds = total_seconds(trainer.rows, trainer.evals)
        # Evals between generations count, what came before the first one does not.
        first, then = self.first = self.first or (done, seconds)
        each = (seconds - then) / (done - first) if done > first else row["seconds"]
        count = f"{done:{len(str(generations))}d}/{generations}"
        time = f"{duration(seconds)}, {duration(each * (generations - done))} left"
        self.view.update(self.row, completed=done, description=f"{count}  {time}")
        self._show(trainer)
        if not self.live and (done % max(1, generations // 10) == 0 or done == 1):
            reward = value("reward", row["reward_mean"])
            say(f"{count}  reward {reward}  {_held_out(trainer)}  {time}", self.console)
            self._say_sample()

    def on_end(self, trainer: Run, summary: Summary | None) -> None:
        self._show(trainer)
        self.view.stop()
        if not self.live:
            self._say_sample()

    def _show(self, trainer: Run) -> None:
        """Below the bar, as soon as it is drawn next."""
        reward = (
            f"reward {_with_best('reward', [row['reward_mean'] for row in trainer.rows])}  " if trainer.rows else ""
        )
        self.view.lines = [reward + _held_out(trainer), self.sample]

    def _say_sample(self) -> None:
        """Each once: in a pipe nothing is overwritten."""
        if self.sample != self.shown:
            self.shown = self.sample
            say(self.sample, self.console)


def _held_out(trainer: Run) -> str:
    metric, evals = trainer.task.metric, trainer.evals
    name = "held-out" if metric == "reward" else f"held-out {metric}"
    values: list[Any] = [dict(row)[metric] for row in evals]
    return f"{name} {_with_best(metric, values)}" if evals else ""


def _with_best(metric: str, values: Sequence[float | None]) -> str:
    """The last of them, and the best so far."""
    known = [number for number in values if number is not None]
    return f"{value(metric, values[-1])}, best {value(metric, max(known, default=None))}"


def _sample(folder: Path, generation: int, number: int) -> str:
    """A held-out question with its answer after so many updates, in one line of at most 79 characters: of each eval
    another one. Empty where no answers were kept."""
    answers = read_rows(folder / "answers" / ("tuned.jsonl" if generation else "base.jsonl"))
    if not answers:
        return ""
    row = answers[number % len(answers)]
    prompt = row["prompt"] if isinstance(row["prompt"], str) else str(row["prompt"][-1]["content"])
    exact = row.get("exact")
    worth = f"reward {value('reward', row['reward'])}" if exact is None else "right" if exact == 1 else "wrong"
    # The head of a question, the end of an answer: there the result stands
    return f"sample: {_in_short(prompt, 24)} -> {_in_short(row['completion'], 26, end=True)} ({worth})"


def _in_short(text: str, width: int, end: bool = False) -> str:
    """The first words of a text, or with `end` the last ones, in one line and without what a terminal would obey."""
    plain = " ".join("".join(mark if mark.isprintable() else " " for mark in text).split())
    if cell_len(plain) <= width:
        return plain
    words = plain.split(" ")[:: -1 if end else 1]
    kept: list[str] = []
    for word in words:
        if cell_len(" ".join([*kept, word])) > width - 2:
            break
        kept.append(word)
    if not kept:  # one word longer than that
        return f"…{set_cell_size(words[0][::-1], width - 1)[::-1]}" if end else f"{set_cell_size(words[0], width - 1)}…"
    return f"… {' '.join(kept[::-1])}" if end else f"{' '.join(kept)} …"
