"""One ES run in a folder: load, measure, train, measure again, write; or continue where a killed one stopped.

What the folder holds is in README ("A run is a log"). run.log and journal decide how a run continues (runlog.py); all
other files are for people and can be made again from them.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import es_kernels
from es_finetune import errors
from es_finetune.config import TrainConfig, recorded_options
from es_finetune.errors import RewardFailed, UserError
from es_finetune.evaluation.evaluator import Unaskable
from es_finetune.monitor.advice import norms_note, warnings_of
from es_finetune.monitor.plots import plot_run
from es_finetune.monitor.progress import Progress
from es_finetune.monitor.rows import estimate, eval_row, population_row, summary, total_seconds
from es_finetune.monitor.trackers import Tracker, require
from es_finetune.runs.files import append_row, generation_rows, save_answers, write_atomically
from es_finetune.runs.folder import CURVES, check_folder, inherit, is_ours, remove
from es_finetune.runs.log import FORMAT, SealedLines, parse_log, read_journals, sealed
from es_finetune.runs.replay import check_start
from es_finetune.tasks import Task
from es_finetune.workers import torchrun
from es_finetune.workers.setup import make_ranks, make_workers
from es_finetune.workers.worker import line_of

_FROM_THIS_ONE = "from this one's model if you like (es-finetune export)"


def follow(config: TrainConfig, **objects) -> None:
    """What the ranks of torchrun do instead of a Trainer's work, all but the first: their share of the members.
    Arguments as for Trainer."""
    config = torchrun.for_this_rank(config)
    inherit(config)
    make_ranks(config, **objects).follow(Path(config.output), config.generations)


class Trainer:
    """Everything a run needs, made and checked before it starts; `train` does the work.

    config:            what to do. Its `model` and `task` are loaded, unless objects are given:
    model, tokenizer:  a causal LM of transformers (its parameters that require grad are tuned, in place) and its
                       tokenizer. Those that text does not pass through, as of a vision tower, are frozen. config.model
                       is then only the name in the log.
    task:              any object with the attributes of tasks.Task, as load_task("custom", data=[...],
                       reward=function).

    A bad config, model, task or folder raises ValueError or OSError from the constructor, before any long work.

    Under torchrun it is for the first rank, which writes the folder; the others call `follow`.
    """

    def __init__(self, config: TrainConfig, *, model=None, tokenizer=None, task: Task | None = None):
        if torchrun.under_torchrun():
            if not torchrun.is_first_rank():
                raise RuntimeError(
                    "under torchrun a Trainer is for the first rank, which writes the folder: call "
                    "es_finetune.trainer.follow() on the others"
                )
            config = torchrun.for_this_rank(config)
        self.config = config = copy.copy(config)
        self.folder = Path(config.output)
        errors.require("a run", "finetune", *errors.FINETUNE)
        inherit(config)
        open_prompts = config.prompts is None
        check_folder(self.folder, config)
        require(config.report_to)
        with self._resumable():
            self.workers = make_workers(config, model=model, tokenizer=tokenizer, task=task)
        self.model, self.task = self.workers.model, self.workers.task
        self._by_default = open_prompts and config.prompts  # prompts a generation, where nobody asked for a number
        self.log: SealedLines | None = None
        self.journal: SealedLines | None = None
        self.generation = 0  # updates done
        self._proof: dict[str, Any] = {}  # the fingerprints after them
        self._notes: list[str] = []
        self._scored: list[dict[str, Any]] = []  # members that an earlier process scored
        self._rows: list[dict[str, Any]] = []
        self._evals: list[dict[str, Any]] = []
        try:
            with self._resumable():
                # A pool's workers load model and task only now: still nothing has been written
                start = self._proof = self.workers.start()
            self.folder.mkdir(parents=True, exist_ok=True)
            self.log = SealedLines(self.folder / "run.log")
            self.journal = SealedLines(self.folder / "journal", sync=False)
            self._resume(start) if config.resume else self._begin(start)
        except BaseException:
            self._let_go()
            raise

    @contextlib.contextmanager
    def _resumable(self) -> Iterator[None]:
        """Within, a question that cannot be asked says what that means for a run which an older version began with
        it."""
        try:
            yield
        except Unaskable as error:
            if not self.config.resume:
                raise
            raise UserError(
                f"{error}. {self.folder} was begun with it and cannot go on: begin another run without it, "
                f"{_FROM_THIS_ONE}"
            ) from error

    # --- the folder ---------------------------------------------------------------------------------------------------

    def _begin(self, start: dict[str, Any]) -> None:
        """A new run: prove what it will write, remove what an older one left, then write."""
        config, folder = self.config, self.folder
        if self.log.lines and not config.overwrite:
            raise UserError(
                f"output {folder} holds a run that another process has begun meanwhile: give another folder"
            )
        versions = {"torch": torch.__version__, "es_kernels": es_kernels.__version__}
        header = {
            "run": FORMAT,
            "es_finetune": es_kernels.__version__,
            "config": recorded_options(config),
            **start,
            "versions": versions,
        }
        sealed(header)
        # Older curves step aside until the trackers have started: one that refuses shall leave the old run as it was.
        curves = [folder / name for name in CURVES if (folder / name).exists()]
        for path in curves:
            path.rename(f"{path}.old")
        try:
            self.tracker = Tracker(config.report_to, folder, recorded_options(config))
        except BaseException:
            remove(folder / name for name in CURVES)
            for path in curves:
                Path(f"{path}.old").rename(path)
            raise
        # The first line comes last: until it is there, the folder holds no run, and nothing of an older one counts.
        self.log.clear()
        self.journal.clear()
        remove(
            path for path in folder.iterdir() if is_ours(path.name) and path.name not in ("run.log", "journal", *CURVES)
        )
        write_atomically(folder / "config.json", json.dumps(recorded_options(config), indent=2) + "\n")
        self.log.append(header)
        self.workers.fast_forward([])

    def _resume(self, start: dict[str, Any]) -> None:
        """Bring the workers to where the log ends, and the files for people with them."""
        config, folder = self.config, self.folder
        header, generations = parse_log(folder / "run.log", self.log.lines)
        check_start(header, start, config.model)
        self._refuse_other_task(header, start)
        self._scored = read_journals(folder)  # also of ranks that there were more of
        self.workers.fast_forward(self.log.lines[1:], folder / "snapshots")
        self.generation = len(generations)
        self._proof = self.log.lines[-1]  # the header, where there is no generation
        for rows, name, least in ((self._rows, "metrics.jsonl", 0), (self._evals, "evals.jsonl", 1)):
            rows += [row for row in generation_rows(folder / name) if row["generation"] < len(generations) + least]
        for rows, name in ((self._rows, "metrics.jsonl"), (self._evals, "evals.jsonl")):
            write_atomically(folder / name, "".join(json.dumps(row) + "\n" for row in rows))
        self.tracker = Tracker(config.report_to, folder, recorded_options(config), done=len(generations))
        if len(generations) < config.generations:
            remove([folder / "summary.json"])  # it says that a run is complete
        write_atomically(folder / "config.json", json.dumps(recorded_options(config), indent=2) + "\n")

    def _refuse_other_task(self, header: dict[str, Any], start: dict[str, Any]) -> None:
        """ValueError unless the log's questions are asked and answers scored as they were."""
        config, folder = self.config, self.folder
        for split in ("train", "test"):
            if header[f"{split}_items"] != start[f"{split}_items"]:
                raise UserError(
                    f"the {split} items of task {config.task} are not those that the run in {folder} began with"
                )
        for split in ("train", "test"):
            if header[f"{split}_scoring"] != start[f"{split}_scoring"]:
                raise UserError(
                    f"what the {split} items of task {config.task} give the reward, as reference answers, is not what "
                    f"the run in {folder} "
                    f"began with: put it back as it was, or begin another run, {_FROM_THIS_ONE}"
                )
        if header["reward"] != start["reward"]:
            raise UserError(
                f"the reward {config.reward or 'given'} is not the one that the run in {folder} began with, or a "
                "module beside it is not: "
                f"put it back as it was, or begin another run, {_FROM_THIS_ONE}"
            )

    # --- the run ------------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Run to the last generation; returns what summary.json holds. Call it once; to go on later, resume."""
        try:
            with Progress(self.config.generations, self.task.metric, done=self.generation) as progress:
                self._run(progress)
            return self._finish()
        finally:
            self.close()

    @property
    def members(self) -> int:
        """How many members of the generation in progress have been scored, and need not be again."""
        return len(self.workers.plan.known(read_journals(self.folder), self.generation))

    def close(self) -> None:
        """Let go of the run's folder and the workers, for a Trainer that shall not train; `train` does so at its
        end."""
        self.tracker.close()
        self._let_go()

    def _let_go(self) -> None:
        for file in (self.log, self.journal):
            if file is not None:
                file.close()
        self.workers.close()

    def _run(self, progress: Progress) -> None:
        config, workers = self.config, self.workers
        held_out = len(workers.plan.held_out)
        progress.note(
            f"{self.folder}: {config.task}, {len(self.task.train)} training and {held_out} held-out prompts; "
            f"{workers.parameters:,} parameters, backend "
            f"{workers.backend}{f', {workers.count} workers' if workers.count > 1 else ''}"
        )
        for note in (*self._notes, *self.task.notes):
            progress.note(note)
        if self._by_default:
            progress.note(
                f"{config.prompts} of the {len(self.task.train):,} training prompts are drawn for each generation; "
                "--prompts 0 takes all"
            )
        prompts = config.prompts or len(self.task.train)
        progress.note(
            f"{config.population * prompts:,} answers a generation: {config.population} members x {prompts:,} prompts"
        )
        while True:
            done = self.generation
            if (
                not self._evals
                or done in (0, config.generations)
                or (config.eval_every and done % config.eval_every == 0)
            ):
                self._evaluate_held_out(progress)
            if done >= config.generations:
                return
            row = self._generation(progress)
            self.tracker.log(row, self.generation)
            if len(self._rows) == 1:
                whole = estimate(row["seconds"], self._evals[0], config.generations, config.eval_every)
                progress.note(f"estimate: {whole}; peak memory so far {row['peak_memory_bytes'] / 2**30:.1f} GiB")
            if (note := norms_note(self._rows)) is not None:
                progress.note(note)
            for warning in row["warnings"]:
                progress.note(f"generation {row['generation'] + 1}: {warning}")
            progress.update(row, self._evals[-1][self.task.metric], total_seconds(self._rows, self._evals))

    def _generation(self, progress: Progress) -> dict[str, Any]:
        """One generation: score the members that the journal does not hold, update, log. Returns its row of
        metrics.jsonl."""
        config, generation = self.config, self.generation
        begin = time.perf_counter()
        known = self.workers.plan.known(self._scored, generation)
        # Seconds of an earlier process, which this one's clock does not hold.
        before = (
            math.fsum(line["seconds_generate"] + line["seconds_score"] for line in known.values()) / self.workers.count
        )
        if not known:
            self.journal.clear()
        # Members are handed out in this order, so that of several workers a member's place says how far all of them
        # are.
        places = {member: place for place, member in enumerate(self.workers.plan.left(known), 1)}
        new = 0

        def keep(line: dict[str, Any]) -> None:
            nonlocal new
            self.journal.append(line)
            place, new = places[line["member"]], new + 1
            seconds = (
                (time.perf_counter() - begin) / max(place, min(self.workers.count, len(places))) * config.population
            )
            if new == 1 and not self._rows:
                progress.note(
                    "estimate after the first member: "
                    f"{estimate(seconds, self._evals[0], config.generations, config.eval_every)}"
                )
            progress.member(len(known) + place, config.population, seconds)

        with_health = bool(config.health_every) and (
            generation % config.health_every == 0 or generation == config.generations - 1
        )
        members, dropped = self.workers.evaluate(generation, known, keep, with_health)
        update, by_prompt = self.workers.plan.update(generation, members, dropped)
        found = self.workers.update(update, with_health)
        row = {
            "generation": generation,
            "sigma": found["sigma"][0],
            "lr": found["lr"][0],
            **population_row(members, by_prompt, before + time.perf_counter() - begin, self.workers.count),
            "seconds_kernels": found["seconds_kernels"],
            "theta": f"{found['theta']:016x}",
            "live": f"{found['live']:016x}",
            "peak_memory_bytes": found["peak_memory_bytes"],
            **({"health": found["health"]} if "health" in found else {}),
            **({"dropped": dropped} if dropped else {}),
        }
        row["warnings"] = warnings_of([*self._rows, row], config.population, self._evals[-1])
        append_row(self.folder / "metrics.jsonl", row)
        self._proof = line_of(update, found, dropped)
        self.log.append(self._proof)
        # From here on the generation is made; what follows can be lost.
        self.generation += 1
        self._rows.append(row)
        if config.snapshot_every and self.generation % config.snapshot_every == 0:
            self.workers.save_snapshot(self.folder / "snapshots")
        return row

    def _evaluate_held_out(self, progress: Progress) -> None:
        """Answer the held-out prompts with theta, unless that is already in evals.jsonl."""
        done = self.generation
        if any(look["generation"] == done for look in self._evals):
            return
        progress.now(f"answering {len(self.workers.plan.held_out):,} held-out prompts")
        begin = time.perf_counter()
        evaluation = self.workers.answer_held_out()
        progress.rest()
        if evaluation.all_failed and not done:
            raise RewardFailed(
                "no answer of the base model to a held-out question could be scored; the first failure: "
                f"{evaluation.error[1]}"
            )
        if evaluation.failed:
            failure = f"held-out answers after {done} updates: scoring failed for {evaluation.failed}; prompt {evaluation.error[0]}: {evaluation.error[1]}"
            if self.config.on_reward_error == "stop" and any(score.reward is None for score in evaluation.scores):
                raise RewardFailed(failure)
            progress.note(failure)
        look = eval_row(self.task, evaluation, done, time.perf_counter() - begin)
        (self.folder / "answers").mkdir(exist_ok=True)
        save_answers(
            self.folder / "answers" / ("tuned.jsonl" if done else "base.jsonl"),
            self.workers.plan.held_out,
            evaluation.answers,
            evaluation.scores,
        )
        append_row(self.folder / "evals.jsonl", look)
        self._evals.append(look)
        self.tracker.log(look, done, prefix="held_out")

    def _finish(self) -> dict[str, Any]:
        """Write the model, the plot and the summary, in this order: a folder that has a summary is complete."""
        config = self.config
        found = {
            "task": config.task,
            "model": config.model,
            **summary(self.task.metric, self._rows, self._evals),
            "generations": self.generation,
            "backend": self.workers.backend,
            "noise_version": es_kernels.noise.VERSION,
            "seed": config.seed,
            "fingerprint": self._proof["theta"],
            "live": self._proof["live"],
            "log_bytes": (self.folder / "run.log").stat().st_size,
        }
        if config.save_model:
            self.workers.save_model(self.folder / "model")
        plot_run(
            self.folder / "reward.png",
            f"Evolution strategies on {config.task}",
            self.task.metric,
            self._rows,
            self._evals,
        )
        write_atomically(self.folder / "summary.json", json.dumps(found, indent=2) + "\n")
        return found
