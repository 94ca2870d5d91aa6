"""The progress of a run on a terminal: one live line; in a file or a pipe: one plain line every few generations."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import TextColumn


class Progress:
    """Use as a context manager; `update` after every generation."""

    def __init__(self, generations: int, console: Console | None = None):
        self.generations = generations
        self.console = console or Console(highlight=False, soft_wrap=True)
        # One column of text under 80 characters: a bar beside it would push the generation off a narrow terminal.
        self.bar = Bar(TextColumn("{task.description}", markup=False), console=self.console, disable=not self.console.is_terminal)
        self.row = self.bar.add_task(f"generation 0/{generations}", total=generations)

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self.bar.stop()

    def note(self, text: str) -> None:
        self.console.print(text, markup=False)

    def update(self, row: dict[str, Any], held_out: float, seconds: float, kernel_share: float) -> None:
        """`row`: the generation's metrics; `held_out`: latest exact share of theta on held-out prompts; `kernel_share` of `seconds`."""
        done = row["generation"] + 1
        text = (
            f"generation {done:{len(str(self.generations))}d}/{self.generations}  reward {row['reward_mean']:.3f} max {row['reward_max']:.3f} exact {row['exact_mean']:.0%} "
            f"held-out {held_out:.0%}  {seconds:.0f} s  kernels {kernel_share:.1%}"
        )
        self.bar.update(self.row, completed=done, description=text)
        if not self.console.is_terminal and (done % max(1, self.generations // 10) == 0 or done == 1):
            self.note(text)
