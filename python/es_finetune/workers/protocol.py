"""Several workers on one run. A generation costs N seeds out and N scores back, whatever the size of the model: each
worker makes the noise itself and repeats every update, and fingerprints prove that all came to the same weights.

`Workers` is what a Trainer knows of them. worker.Worker is one alone; torchrun.Ranks are the processes of torchrun;
ray_pool.RayPool is a pool of Ray actors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from es_finetune.errors import UserError, WorkersDiffer
from es_finetune.evaluation.evaluator import Evaluation
from es_finetune.optim.update import Update
from es_finetune.tasks import Task
from es_finetune.workers.plan import Plan


class Workers(Protocol):
    """What a Trainer knows of its workers. Methods are as in worker.Worker, where they are described.

    Attributes:
        count: How many there are.
        task: What is asked.
        plan: What a generation asks of each.
        model: The torch module, where it is in this process; else None.
        backend: Of es_kernels, as it names itself.
        parameters: Of the model.
        machine: Of one of them, as `runs.environment.machine` tells it.
    """

    count: int
    task: Task
    plan: Plan
    model: Any
    backend: str
    parameters: int
    machine: dict[str, str]

    def start(self) -> dict[str, Any]: ...

    def fast_forward(self, generations: Sequence[dict[str, Any]], snapshots: Path | None = None) -> None: ...

    def evaluate(
        self, generation: int, known: dict[int, dict], keep: Callable[[dict], None], with_health: bool = False
    ) -> tuple[list[dict], list[int]]: ...

    def update(self, update: Update, with_health: bool = False) -> dict[str, Any]: ...

    def answer_held_out(self) -> Evaluation: ...

    def stop(self) -> None: ...

    def save_model(self, folder: Path) -> None: ...

    def save_snapshot(self, folder: Path) -> None: ...

    def close(self) -> None: ...


def require_shared_master(master: str) -> None:
    """UserError for weights that would be a worker's own."""
    if master == "none":
        raise UserError(
            "master 'none' rounds the weights at every member, which several workers do not share: choose fp32, copy "
            "or host"
        )


def require_same_run(name: str, start: dict[str, Any], expected: dict[str, Any]) -> None:
    """WorkersDiffer unless a worker's start is the expected one."""
    for what, value in expected.items():
        # Its name and form may differ: the weights are known by fingerprint
        if start[what] != value and what != "model":
            raise WorkersDiffer(
                f"{name} is not on the same run as the others: its {what} is {start[what]!r}, not {value!r}"
            )


def require_agreement(update: Update, results: dict[str, dict[str, Any]], one: dict[str, Any]) -> dict[str, Any]:
    """Prove that an update came to the same weights on several workers.

    Args:
        update: Which it was.
        results: What each worker's `update` returned, by the worker's name.
        one: Of these the one to return.

    Returns:
        `one`, with the kernels' seconds of all.

    Raises:
        WorkersDiffer: Weights differ. It names the workers that have others than most.
    """
    proofs = {name: f"theta {of['theta']:016x}, live {of['live']:016x}" for name, of in results.items()}
    (most, agree), *others = Counter(proofs.values()).most_common()
    if others:
        odd = "; ".join(f"{name} has {proof}" for name, proof in proofs.items() if proof != most)
        raise WorkersDiffer(
            f"after generation {update.generation + 1} the weights of the workers differ: {odd}; {agree} of "
            f"{len(results)} have {most}. The generation is not in the log: resume the run; if it happens again, "
            "look for faulty memory or different builds"
        )
    return {**one, "seconds_kernels": math.fsum(of["seconds_kernels"] for of in results.values())}
