"""Several workers on one run. A generation costs N seeds out and N scores back, whatever the size of the model: each worker makes the noise
itself and repeats every update, and fingerprints prove that all came to the same weights.

`Workers` is what a Trainer knows of them. worker.Worker is one alone; ranks.Ranks are the processes of torchrun; pool.RayPool a pool of Ray
actors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from es_finetune.evaluate import Evaluation
from es_finetune.optimizer import Update
from es_finetune.tasks import Task


class Workers(Protocol):
    """Methods as in worker.Worker, where they are described."""

    count: int
    task: Task
    model: Any  # where it is in this process, else None
    backend: str
    parameters: int

    def start(self) -> dict[str, Any]: ...

    def fast_forward(self, generations: Sequence[dict[str, Any]], snapshots: Path | None = None) -> None: ...

    def evaluate(
        self, generation: int, known: dict[int, dict], keep: Callable[[dict], None], looking: bool = False
    ) -> tuple[list[dict], list[int]]: ...

    def update(self, update: Update, looking: bool = False) -> dict[str, Any]: ...

    def answer_held_out(self) -> Evaluation: ...

    def save_model(self, folder: Path) -> None: ...

    def save_snapshot(self, folder: Path) -> None: ...

    def peak_memory(self) -> int: ...

    def close(self) -> None: ...


class WorkersDiffer(RuntimeError):
    """Workers that should hold the same weights, or run the same run, do not."""
