"""One ES run in a folder: load, evaluate, train, evaluate again, write; or continue where a killed one stopped.

What the folder holds is in docs/reference/files.md. run.log and journal decide how a run continues (runs/log.py); all
other files are for people and can be made again from them.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import es_kernels
from es_finetune import errors
from es_finetune.config import TrainConfig, recorded_options
from es_finetune.errors import RewardFailed, UserError, did_you_mean
from es_finetune.evaluation.evaluator import Unaskable
from es_finetune.monitor.advice import norms_note, warnings_of
from es_finetune.monitor.callbacks import Callback
from es_finetune.monitor.plots import plot_run
from es_finetune.monitor.progress import duration, estimate
from es_finetune.monitor.rows import EvalRow, GenerationRow, Row, Summary, eval_row, population_row, summary
from es_finetune.monitor.trackers import as_callback, trackers_named
from es_finetune.runs.environment import versions
from es_finetune.runs.files import append_row, generation_rows, save_answers, write_atomically
from es_finetune.runs.folder import ASIDE, CURVES, check_folder, inherit, is_ours, remove
from es_finetune.runs.log import FORMAT, Generation, SealedLines, is_begun, parse_log, read_journals, read_log, sealed
from es_finetune.runs.model_card import write_model_card
from es_finetune.runs.replay import check_start, config_of
from es_finetune.runs.setup import given_task
from es_finetune.tasks import Data, Reward, Task
from es_finetune.workers import torchrun
from es_finetune.workers.setup import make_ranks, make_workers

_FROM_THIS_ONE = "from this one's model if you like (es-finetune export)"

logger = logging.getLogger(__name__)


def follow(
    config: TrainConfig | str | Path,
    *,
    model: Any = None,
    tokenizer: Any = None,
    data: Data | None = None,
    test_data: Data | None = None,
    reward: Reward | None = None,
    task: Task | None = None,
    **changes: Any,
) -> None:
    """What every rank of torchrun but the first does instead of training: its share of the members, to the run's end.

    Args:
        config: As the first rank's Trainer has it, or the folder of a run, also here, which that one resumes by
            `Trainer.resume`.
        model: As for the first rank's Trainer, and so are the others.
        tokenizer: See there.
        data: See there.
        test_data: See there.
        reward: See there.
        task: See there.
        **changes: With a folder, as for `Trainer.resume`.

    Raises:
        UserError: As for the first rank's Trainer.
        RunError: Another rank has ended, or is not on the same run.
    """
    if not isinstance(config, TrainConfig):
        config, model = _resumed(config, model, changes, data=data, test_data=test_data, reward=reward)
    elif changes:
        raise UserError(f"{min(changes)} goes into the config")
    config = torchrun.for_this_rank(config)
    inherit(config)
    task = given_task(config, task, data=data, test_data=test_data, reward=reward)
    ranks = make_ranks(config, model=model, tokenizer=tokenizer, task=task)
    ranks.follow(Path(config.output), config.generations)


class Trainer:
    """A run: made and checked here, begun by `train`.

    The constructor reads and loads, and writes nothing: an older run in the folder stays as it is until `train` has
    proven and started all that the new one needs. A Trainer prints nothing but warnings; what it has to say goes to
    `logging`, as "es_finetune", and `monitor.progress` draws it.

        trainer = Trainer(TrainConfig(model=..., task="custom"), data=questions, reward=reward)
        summary = trainer.train()

    Args:
        config: What to do. It stays as it is. Its `model` and `task` are loaded, unless objects are given:
        model: A causal LM of transformers, tuned in place: its parameters that require grad, and of these only those
            that text passes through (a vision tower is frozen). `config.model` is then but its name in the log.
        tokenizer: Its tokenizer.
        data: The questions of the task "custom": dicts with a "prompt" and whatever the reward needs, or a .jsonl file
            of such. A path or name serves as `config.data` does.
        test_data: The held-out ones; without them a share of `data` is held out.
        reward: `reward(completion, item)`, a number to be made large: a function, which runs in this process without a
            time limit, or "FILE.py:FUNCTION", which runs in a process of its own.
        task: Another task: any object with the attributes of `tasks.Task`.
        callbacks: What follows the run: `Callback` objects, and trackers of accelerate, beside those of
            `config.report_to`.

    Attributes:
        config: As given, with all that it left open.
        folder: Of the run.
        model: The model being tuned; None where it is in other processes (ray, vllm).
        task: The task.
        begun: Whether the folder holds this run, and no older one or none.
        generation: Updates done.
        rows: Lines of metrics.jsonl so far, one for each update.
        evals: Lines of evals.jsonl so far.

    Raises:
        UserError: Something asked for cannot be done: config, model, task or folder. Always before long work.
        OSError: A file cannot be read.
        RuntimeError: Under torchrun, on another rank than the first: call `es_finetune.trainer.follow` there.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        model: Any = None,
        tokenizer: Any = None,
        data: Data | None = None,
        test_data: Data | None = None,
        reward: Reward | None = None,
        task: Task | None = None,
        callbacks: Iterable[Any] = (),
    ):
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
        task = given_task(config, task, data=data, test_data=test_data, reward=reward)
        check_folder(self.folder, config)
        self.callbacks: list[Callback] = [*trackers_named(config.report_to), *map(as_callback, callbacks)]
        self.generation = 0
        self.rows: list[GenerationRow] = []
        self.evals: list[EvalRow] = []
        self.begun = config.resume
        self._started: list[Callback] = []
        self._stopped = self._closed = False
        self._open_files: list[SealedLines] = []
        self._scored: list[Row] = []  # members that an earlier process scored
        with self._resumable():
            self.workers = make_workers(config, model=model, tokenizer=tokenizer, task=task)
        try:
            self.model, self.task = self.workers.model, self.workers.task
            self._default_prompts = open_prompts and bool(config.prompts)  # nobody asked for their number
            with self._resumable():
                start = self.workers.start()  # a pool's workers load model and task only now
            self._logged = self._read_run(start) if config.resume else (self._header(start), [])
        except BaseException:
            self.close()
            raise

    @classmethod
    def resume(
        cls,
        folder: str | Path,
        *,
        model: Any = None,
        tokenizer: Any = None,
        data: Data | None = None,
        test_data: Data | None = None,
        reward: Reward | None = None,
        task: Task | None = None,
        callbacks: Iterable[Any] = (),
        **changes: Any,
    ) -> Trainer:
        """The Trainer that goes on with the run in a folder, with the config of its log.

        Args:
            folder: Of the run.
            model: As for Trainer, and so are the others: give again what was given when the run began. Or the folder or
                hub name where the base model is now.
            tokenizer: See there.
            data: See there.
            test_data: See there.
            reward: See there.
            task: See there.
            callbacks: See there.
            **changes: Options of TrainConfig that may change: those that decide where, how fast and how closely watched
                a run is, and with constant schedules `generations`.

        Returns:
            A Trainer at the generation where the log ends.

        Raises:
            UserError: The folder holds no run, or not one that these arguments can go on with.
        """
        again: dict[str, Any] = {"data": data, "test_data": test_data, "reward": reward}
        config, model = _resumed(folder, model, changes, **again)
        return cls(config, model=model, tokenizer=tokenizer, task=task, callbacks=callbacks, **again)

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

    # --- checked by the constructor -----------------------------------------------------------------------------------

    def _header(self, start: Row) -> Row:
        """The first line of a new run's log, proven to be one."""
        header: Row = {
            "run": FORMAT,
            "es_finetune": es_kernels.__version__,
            "config": recorded_options(self.config),
            **start,
            "versions": versions(),
            "machine": self.workers.machine,
        }
        sealed(header)
        return header

    def _read_run(self, start: Row) -> tuple[Row, list[Generation]]:
        """Bring workers and rows to where the log ends; its header and generations."""
        header, generations = read_log(self.folder / "run.log")
        check_start(header, start, self.config.model)
        done = len(generations)
        self._check_same_questions(header, start)
        rows: list[Any] = generation_rows(self.folder / "metrics.jsonl")
        evals: list[Any] = generation_rows(self.folder / "evals.jsonl")
        self.rows = [row for row in rows if row["generation"] < done]
        self.evals = [row for row in evals if row["generation"] <= done]
        self.workers.fast_forward([generation.to_json() for generation in generations], self.folder / "snapshots")
        self.generation = done
        return header, generations

    def _check_same_questions(self, header: Row, start: Row) -> None:
        """UserError unless the log's questions are asked and answers scored as they were."""
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
                    f"the run in {folder} began with: put it back as it was, or begin another run, {_FROM_THIS_ONE}"
                )
        if header["reward"] != start["reward"]:
            raise UserError(
                f"the reward {config.reward or 'given'} is not the one that the run in {folder} began with, or a "
                f"module beside it is not: put it back as it was, or begin another run, {_FROM_THIS_ONE}"
            )

    # --- the run ------------------------------------------------------------------------------------------------------

    def train(self) -> Summary:
        """Run to the last generation, or to the end of the one in which `stop` was called. Call it once.

        Returns:
            What summary.json holds.

        Raises:
            UserError: The folder has been taken by another process meanwhile, a tracker cannot be started, or this
                Trainer has trained before. Nothing of an older run has been changed.
            RewardFailed: The reward failed, and `on_reward_error` is "stop"; or no answer could be scored.
            OSError: A file cannot be written, as on a full disk. What was written is whole.
        """
        if self._closed:
            raise UserError(
                f"this Trainer is closed: go on with Trainer.resume({str(self.folder)!r}), or make another one"
            )
        result = None
        try:
            self._open()
            self._run()
            result = self._finish()
        finally:
            try:
                self._end_callbacks(result)
            finally:
                self.close()
        return result

    def stop(self) -> None:
        """End the run cleanly after the generation in progress, from a callback or another thread: held-out eval,
        model and summary are written, and the run can be resumed."""
        self._stopped = True

    @property
    def members(self) -> int:
        """How many members of the generation in progress have been scored, and need not be again."""
        return len(self.workers.plan.known(read_journals(self.folder), self.generation))

    def close(self) -> None:
        """Let go of the workers, for a Trainer that will not train; `train` does so at its end."""
        self._closed = True
        for file in self._open_files:
            file.close()
        self.workers.close()

    def _open(self) -> None:
        """Take the folder and start the callbacks; only then change what is in it."""
        config, folder = self.config, self.folder
        folder.mkdir(parents=True, exist_ok=True)
        self._log = SealedLines(folder / "run.log")
        self._open_files.append(self._log)
        self._journal = SealedLines(folder / "journal", sync=False)
        self._open_files.append(self._journal)
        _put_curves_back(folder)
        if config.resume:
            if parse_log(folder / "run.log", self._log.lines) != self._logged:
                raise UserError(
                    f"another process has gone on with the run in {folder} meanwhile: make the Trainer again"
                )
            self._scored = read_journals(folder)  # also of ranks that there were more of
            self._start_callbacks()
            if config.generations != self._logged[0]["config"]["generations"]:
                self._log.append({"generations": config.generations})
            rows: Sequence[Mapping[str, Any]]
            for rows, name in ((self.rows, "metrics.jsonl"), (self.evals, "evals.jsonl")):
                write_atomically(folder / name, "".join(json.dumps(row) + "\n" for row in rows))
            if self.generation < config.generations:
                remove([folder / "summary.json"])  # it says that a run is complete
        else:
            if self._log.lines and not config.overwrite:
                raise UserError(
                    f"output {folder} holds a run that another process has begun meanwhile: give another folder"
                )
            with _curves_aside(folder):
                self._start_callbacks()
            # The first line comes last: until it is there, the folder holds no run, and nothing of an older one counts.
            self._log.clear()
            self._journal.clear()
            kept = ("run.log", "journal", *CURVES)
            remove(path for path in folder.iterdir() if is_ours(path.name) and path.name not in kept)
        write_atomically(folder / "config.json", json.dumps(recorded_options(config), indent=2) + "\n")
        if not config.resume:
            self._log.append(self._logged[0])
            self.begun = True
            self.workers.fast_forward([])

    def _start_callbacks(self) -> None:
        try:
            for callback in self.callbacks:
                callback.on_start(self)
                self._started.append(callback)
        except BaseException:
            self._end_callbacks(None)
            raise

    def _end_callbacks(self, result: Summary | None) -> None:
        """Tell all that were started. An error of theirs is raised when all know, unless another one ended the run."""
        failed: Exception | None = None
        while self._started:
            callback = self._started.pop(0)
            try:
                callback.on_end(self, result)
            except Exception as error:
                failed = failed or error
                if result is None:
                    logger.warning("%s failed in on_end: %s", type(callback).__name__, error)
        if failed is not None and result is not None:
            raise failed

    def _doing(self, text: str) -> None:
        for callback in self.callbacks:
            callback.on_activity(self, text)

    def _run(self) -> None:
        config, workers, task = self.config, self.workers, self.task
        several = f", {workers.count} workers" if workers.count > 1 else ""
        logger.info(
            f"{self.folder}: {config.task}, {len(task.train)} training and {len(workers.plan.held_out)} "
            f"held-out prompts; {workers.parameters:,} parameters, backend {workers.backend}{several}"
        )
        for note in task.notes:
            logger.info(note)
        prompts = config.prompts or len(task.train)
        if self._default_prompts:
            logger.info(
                f"{prompts} of the {len(task.train):,} training prompts are drawn for each generation; "
                "--prompts 0 takes all"
            )
        logger.info(
            f"{config.population * prompts * config.samples:,} answers a generation: {config.population} members x "
            f"{prompts:,} prompts" + (f" x {config.samples} samples" if config.samples > 1 else "")
        )
        self._first = self.generation  # here
        while self.generation < config.generations and not self._stopped:
            if not self.evals or (config.eval_every and self.generation % config.eval_every == 0):
                self._evaluate_held_out()
                if self._stopped:
                    break
            row = self._generation()
            if len(self.rows) == 1:
                peak = row["peak_memory_bytes"] / 2**30
                logger.info(f"estimate: {self._estimate(row['seconds'])}; peak memory so far {peak:.1f} GiB")
            if (lost := norms_note(self.rows)) is not None:
                logger.info(lost)
            for warning in row["warnings"]:
                logger.warning(f"generation {row['generation'] + 1}: {warning}")
            for callback in self.callbacks:
                callback.on_generation(self, row)
        self._evaluate_held_out()
        if self.generation < config.generations:
            workers.stop()

    def _estimate(self, seconds: float) -> str:
        return estimate(seconds, self.evals[0]["seconds"], self.config.generations, self.config.eval_every)

    def _generation(self) -> GenerationRow:
        """One generation: score the members that the journal does not hold, update, log. Returns its row of
        metrics.jsonl."""
        config, generation, workers = self.config, self.generation, self.workers
        begin = time.perf_counter()
        known = workers.plan.known(self._scored, generation)
        # Seconds of an earlier process, which this one's clock does not hold.
        before = math.fsum(line["seconds_generate"] + line["seconds_score"] for line in known.values()) / workers.count
        if not known:
            self._journal.clear()
        # Members are handed out in this order, so that of several workers a member's place says how far all of them
        # are.
        places = {member: place for place, member in enumerate(workers.plan.left(known), 1)}
        new = 0

        def keep(line: Row) -> None:
            nonlocal new
            self._journal.append(line)
            place, new = places[line["member"]], new + 1
            elapsed = time.perf_counter() - begin
            seconds = (
                elapsed
                / max(place, min(workers.count * workers.plan.group(workers.count), len(places)))
                * config.population
            )
            if new == 1 and not self.rows:
                logger.info(f"estimate after the first member: {self._estimate(seconds)}")
            # Later ones are estimated by those before
            about = f", generation about {duration(seconds)}" if generation == self._first else ""
            self._doing(f"member {len(known) + place}/{config.population}{about}")

        last = generation == config.generations - 1
        with_health = bool(config.health_every) and (generation % config.health_every == 0 or last)
        members, dropped = workers.evaluate(generation, known, keep, with_health)
        update, by_prompt = workers.plan.update(generation, members, dropped)
        outcome = workers.update(update, with_health)
        row: Any = {
            "generation": generation,
            "sigma": outcome["sigma"][0],
            "lr": outcome["lr"][0],
            **population_row(members, by_prompt, before + time.perf_counter() - begin, workers.count, config.samples),
            "seconds_kernels": outcome["seconds_kernels"],
            "theta": f"{outcome['theta']:016x}",
            "live": f"{outcome['live']:016x}",
            "peak_memory_bytes": outcome["peak_memory_bytes"],
            **({"health": outcome["health"]} if "health" in outcome else {}),
            **({"dropped": dropped} if dropped else {}),
        }
        row["warnings"] = warnings_of([*self.rows, row], config.population, self.evals[-1])
        append_row(self.folder / "metrics.jsonl", row)
        logged = Generation.after(update, outcome)
        self._log.append(logged.to_json())
        # From here on the generation is made; what follows can be lost.
        self._logged[1].append(logged)
        self.generation += 1
        self.rows.append(row)
        if config.snapshot_every and self.generation % config.snapshot_every == 0:
            workers.save_snapshot(self.folder / "snapshots")
        return row

    def _evaluate_held_out(self) -> None:
        """Answer the held-out prompts with theta, unless that is already in evals.jsonl."""
        done, items = self.generation, self.workers.plan.held_out
        if any(row["generation"] == done for row in self.evals):
            return
        self._doing(f"answering {len(items):,} held-out prompts")
        begin = time.perf_counter()
        evaluation = self.workers.answer_held_out()
        if evaluation.error is not None:
            prompt, why = evaluation.error
            if evaluation.all_failed and not done:
                raise RewardFailed(
                    f"no answer of the base model to a held-out question could be scored; the first failure: {why}"
                )
            failure = (
                f"held-out answers after {done} updates: scoring failed for {evaluation.failed}; prompt {prompt}: {why}"
            )
            if self.config.on_reward_error == "stop" and any(score.reward is None for score in evaluation.scores):
                raise RewardFailed(failure)
            logger.warning(failure)
        row: Any = eval_row(self.task, evaluation, done, time.perf_counter() - begin)
        answers = self.folder / "answers"
        answers.mkdir(exist_ok=True)
        name = "tuned.jsonl" if done else "base.jsonl"
        save_answers(answers / name, items, evaluation.answers, evaluation.scores)
        append_row(self.folder / "evals.jsonl", row)
        self.evals.append(row)
        for callback in self.callbacks:
            callback.on_eval(self, row)

    def _finish(self) -> Summary:
        """Write the model, the plot and the summary, in this order: a folder that has a summary is complete."""
        config, (header, generations) = self.config, self._logged
        proof = generations[-1].to_json() if generations else header
        result: Any = {
            "task": config.task,
            "model": config.model,
            **summary(self.task.metric, self.rows, self.evals),
            "generations": self.generation,
            "backend": self.workers.backend,
            "noise_version": es_kernels.noise.VERSION,
            "seed": config.seed,
            "fingerprint": proof["theta"],
            "live": proof["live"],
            "log_bytes": (self.folder / "run.log").stat().st_size,
        }
        if config.save_model:
            self.workers.save_model(self.folder / "model")
            write_model_card(self.folder / "model", header, generations)
        title = f"Evolution strategies on {config.task}"
        plot_run(self.folder / "reward.png", title, self.task.metric, self.rows, self.evals)
        write_atomically(self.folder / "summary.json", json.dumps(result, indent=2) + "\n")
        return result


def _resumed(folder: str | Path, model: Any, changes: dict[str, Any], **again: Any) -> tuple[TrainConfig, Any]:
    """The config with which the run in a folder goes on, and the model, if that is an object. Arguments and errors as
    of Trainer.resume."""
    folder = Path(folder)
    if not is_begun(folder / "run.log"):
        raise UserError(f"{folder} holds no run to resume: give the folder of a run")
    fields = [field.name for field in dataclasses.fields(TrainConfig)]
    for name in changes:
        if name in ("output", "overwrite", "resume"):
            raise UserError(f"{name} is no option of a run that is resumed in its own folder: leave it out")
        if name not in fields:
            raise UserError(f"unknown option {name!r}{did_you_mean(name, fields)}")
    if isinstance(model, (str, Path)):
        changes, model = {**changes, "model": str(model)}, None
    replaced: dict[str, Any] = dict.fromkeys(name for name, supplied in again.items() if supplied is not None)
    header, _ = read_log(folder / "run.log")
    config = dataclasses.replace(config_of(header, folder), **replaced, **changes, output=str(folder), resume=True)
    return config, model


@contextlib.contextmanager
def _curves_aside(folder: Path) -> Iterator[None]:
    """Older curves step aside while trackers start: one that refuses must leave the older run as it was."""
    for name in CURVES:
        if (folder / name).exists():
            (folder / name).rename(folder / f"{name}{ASIDE}")
    try:
        yield
    except BaseException:
        remove(folder / name for name in CURVES)
        _put_curves_back(folder)
        raise


def _put_curves_back(folder: Path) -> None:
    """Also where the process that set them aside was killed, and left curves of a run that never began."""
    for name in CURVES:
        aside = folder / f"{name}{ASIDE}"
        if aside.exists():
            remove([folder / name])
            aside.rename(folder / name)
