"""The processes of torchrun as workers: each rank has a replica, takes members from a counter that all share, and
repeats every update.

What crosses the wire in a generation: a number drawn for each member, and the members' lines, gathered (2 kB each with
200 questions).
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import functools
import itertools
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from es_finetune.config import TrainConfig
from es_finetune.errors import RunError, UserError, first_line
from es_finetune.evaluation.evaluator import Evaluation
from es_finetune.monitor.rows import Row
from es_finetune.optim.update import Update
from es_finetune.runs.log import SealedLines, is_begun
from es_finetune.workers.protocol import require_agreement, require_same_run, require_shared_master
from es_finetune.workers.worker import Worker

# What ranks wait for is the slowest member, or what the first one does alone. A rank that has died is no such wait:
# torchrun notices at once and ends the others.
_PATIENCE = timedelta(days=1)
_runs = itertools.count()


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_first_rank() -> bool:
    """Whether this process is the one that writes the run's folder: the first rank, or alone."""
    return not under_torchrun() or os.environ["RANK"] == "0"


def for_this_rank(config: TrainConfig) -> TrainConfig:
    """The config for this rank: on a GPU of its own, and resuming if torchrun has restarted a run that had begun.

    Raises:
        UserError: There are more ranks than GPUs here, or the config's weights cannot be shared.
    """
    config = copy.copy(config)
    require_shared_master(config.master)
    if config.device in ("auto", "cuda") and torch.cuda.is_available():
        rank = int(os.environ["LOCAL_RANK"])
        if rank >= torch.cuda.device_count():
            raise UserError(
                f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes here, but there are "
                f"{torch.cuda.device_count()} GPUs: lower --nproc-per-node"
            )
        config.device = f"cuda:{rank}"
        torch.cuda.set_device(rank)
    if int(os.environ["TORCHELASTIC_RESTART_COUNT"]) and is_begun(Path(config.output) / "run.log"):
        config.resume, config.overwrite = True, False
    return config


@functools.cache
def _meet() -> dist.Store:
    """Joins the process group of all ranks, once. Gloo carries what is exchanged (objects of a few kB); with GPUs the
    group has NCCL too, as torch chooses."""
    store, rank, world = next(iter(dist.rendezvous("env://", timeout=_PATIENCE)))
    store.set_timeout(_PATIENCE)
    # torchrun keeps its store when it restarts the processes, and with it the addresses of the dead.
    store = dist.PrefixStore(f"start{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(store=dist.PrefixStore("group", store), rank=rank, world_size=world, timeout=_PATIENCE)
    atexit.register(dist.destroy_process_group)
    return store


class _Stopped(Exception):
    """The first rank goes on to no other generation."""


class Ranks:
    """The workers of a run under torchrun, seen from one of them. Every rank makes the same calls in the same order;
    only `answer_held_out`, `save_model` and `save_snapshot` are its own.

    Args:
        worker: This rank's.
        options: Of its config, those that decide the run (`config.decided_options`): the same on every rank.
    """

    def __init__(self, worker: Worker, options: dict[str, Any]):
        self.worker, self.options = worker, options
        self.plan, self.task, self.model = worker.plan, worker.task, worker.model
        self.backend, self.parameters, self.machine = worker.backend, worker.parameters, worker.machine
        self._store = dist.PrefixStore(f"run{next(_runs)}", _meet())
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        worker.group = self.plan.group(self.count)

    def start(self) -> dict[str, Any]:
        """As of one worker.

        Raises:
            WorkersDiffer: A rank, which it names, is not on the first one's run.
        """
        start = self.worker.start()
        mine = {**start, **{f"option {name}": value for name, value in self.options.items()}}
        everyone = self._gathered((socket.gethostname(), mine))
        _, first = everyone[0]
        for rank, (host, other) in enumerate(everyone):
            require_same_run(f"rank {rank} on {host}", other, first)
        return start

    def fast_forward(self, generations: Sequence[dict[str, Any]], snapshots: Path | None = None) -> None:
        """As of one worker. The first rank's arguments count, on all of them."""
        generations, snapshots = _from_the_first([list(generations), snapshots])
        self.generation = len(generations)
        self.worker.fast_forward(generations, snapshots)

    def evaluate(
        self, generation: int, known: dict[int, Row], keep: Callable[[Row], None], with_health: bool = False
    ) -> tuple[list[Row], list[int]]:
        """As of one worker. What is known is the first rank's to say: it has read the journals of all. Where that has
        stopped, _Stopped."""
        [known] = _from_the_first([known])
        if known is None:
            raise _Stopped
        left = self.plan.left(known)

        def drawn() -> Iterator[int]:
            while (place := self._store.add(f"members of {generation}", 1) - 1) < len(left):
                yield left[place]

        new = self._gathered(self.worker.run(generation, drawn(), keep, with_health))
        lines = {**known, **{line["member"]: line for lines in new for line in lines}}
        return [lines[member] for member in sorted(lines)], []

    def update(self, update: Update, with_health: bool = False) -> dict[str, Any]:
        """As of one worker.

        Raises:
            WorkersDiffer: The weights after it differ; it names the ranks.
        """
        mine = self.worker.update(update, with_health)
        everyone = self._gathered((f"rank {self.rank} on {socket.gethostname()}", mine))
        return require_agreement(update, dict(everyone), mine)

    def follow(self, folder: Path, generations: int) -> None:
        """Take part in the run of the first rank, to its end.

        Args:
            folder: Of the run. This rank's journal is in it, beside the first one's.
            generations: Of the whole run.
        """
        self.start()
        self.fast_forward([])
        folder.mkdir(parents=True, exist_ok=True)
        journal = SealedLines(folder / f"journal-{self.rank}", sync=False)
        held = journal.lines[-1]["generation"] if journal.lines else None

        def keep(line: Row) -> None:
            # Not when a generation begins here: the first rank may die before it has logged the one before, whose
            # members are in here. It has when it takes part in the next.
            nonlocal held
            if line["generation"] != held:
                journal.clear()
                held = line["generation"]
            journal.append(line)

        try:
            for generation in range(self.generation, generations):
                lines, dropped = self.evaluate(generation, {}, keep)
                update, _ = self.plan.update(generation, lines, dropped)
                self.update(update)
        except _Stopped:
            pass
        finally:
            journal.close()

    def answer_held_out(self) -> Evaluation:
        return self.worker.answer_held_out()

    def stop(self) -> None:
        """Tell the other ranks, which wait for the next generation, that none follows."""
        _from_the_first([None])

    def save_model(self, folder: Path) -> None:
        self.worker.save_model(folder)

    def save_snapshot(self, folder: Path) -> None:
        self.worker.save_snapshot(folder)

    def close(self) -> None:
        self.worker.close()

    def _gathered(self, mine: Any) -> list[Any]:
        """What every rank gave, in their order."""
        everyone: list[Any] = [None] * self.count
        with _together():
            dist.all_gather_object(everyone, mine)
        return everyone


def _from_the_first(mine: list[Any]) -> list[Any]:
    """What the first rank gave."""
    with _together():
        dist.broadcast_object_list(mine)
    return mine


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """RunError where another rank has ended, of which torch says no more than that a connection is closed."""
    try:
        yield
    except RuntimeError as error:
        rank, why = os.environ["RANK"], first_line(error)
        raise RunError(f"rank {rank} cannot go on alone: another rank has ended, which says why ({why})") from error
