"""One ES run in a folder: load, measure, train, measure again, write; or continue where a killed one stopped.

What the folder holds is in README ("A run is a log"). run.log and journal decide how a run continues (runlog.py); all
other files are for people and can be made again from them.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import es_kernels
from es_finetune.config import TrainConfig, asked, model_options
from es_finetune.evaluate import Evaluator
from es_finetune.files import append_row, read_rows, write_atomically
from es_finetune.folder import CURVES, claim, is_ours, remove
from es_finetune.health import Health, warnings_of
from es_finetune.measure import save_answers
from es_finetune.metrics import estimate, look_row, member_line, peak_memory, population_row, rewards_by_prompt, summary, total_seconds
from es_finetune.model import load_model, pick_device, save_model
from es_finetune.plot import plot_run
from es_finetune.prepare import make_engine, make_task
from es_finetune.progress import Progress
from es_finetune.replay import check_start, fast_forward, start_of
from es_finetune.runlog import FORMAT, Generation, SealedLines, parse_log
from es_finetune.snapshot import save_snapshot
from es_finetune.tasks import Item, Task
from es_finetune.tracking import Tracker, require
from es_finetune.tuning import make_optimizer, set_schedules
from es_kernels.noise import PROMPT_CHOICE, member_seed


class RewardFailed(RuntimeError):
    """A reward raised, hung or returned no number, and the run was asked to stop then."""


class Trainer:
    """Everything a run needs, made and checked before it starts; `train` does the work.

    config:            what to do. Its `model` and `task` are loaded, unless objects are given:
    model, tokenizer:  a causal LM of transformers (its parameters that require grad are tuned, in place) and its tokenizer.
                       config.model is then only the name in the log.
    task:              any object with the attributes of tasks.Task, as load_task("custom", data=[...], reward=function).

    A bad config, model, task or folder raises ValueError or OSError from the constructor, before any long work.
    """

    def __init__(self, config: TrainConfig, *, model=None, tokenizer=None, task: Task | None = None):
        self.config = config
        self.folder = Path(config.output)
        claim(self.folder, config)
        require(config.report_to)
        self.task = task or make_task(config)
        for split in ("train", "test"):
            if not getattr(self.task, split):
                raise ValueError(f"task {config.task} has no {split} items")
        if config.prompts > len(self.task.train):
            raise ValueError(f"prompts must be at most {len(self.task.train)}, the training prompts of {config.task}, not {config.prompts}")
        if (model is None) != (tokenizer is None):
            raise ValueError("give model and tokenizer together, or neither to load the config's")
        if model is None:
            model, tokenizer, identity = load_model(config.model, device=pick_device(config.device), **model_options(config))
        else:
            identity = {"model": config.model, "class": type(model).__name__, "in_memory": True}
        self.model, self.tokenizer = model, tokenizer
        self.engine = make_engine(config, self.task, model, tokenizer)
        self.optimizer = make_optimizer(model, config)
        self.backend = es_kernels.active_backend(model.device)
        self.held_out = Evaluator(self.engine, self.task, self.task.test[: config.eval_items or None])
        self._training = None if config.prompts else Evaluator(self.engine, self.task, self.task.train)
        self._rows: list[dict[str, Any]] = []
        self._looks: list[dict[str, Any]] = []
        self.health = Health(self.optimizer)  # before resuming: it counts the drift from here
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = SealedLines(self.folder / "run.log")
        self.journal = SealedLines(self.folder / "journal", sync=False)
        try:
            self._resume() if config.resume else self._begin(identity)
        except BaseException:
            self.log.close()
            self.journal.close()
            raise

    # --- the folder ---------------------------------------------------------------------------------------------------

    def _items(self) -> dict[str, str]:
        """Which questions the run is about, as the log's header knows them."""
        return {f"{split}_items": _digest(getattr(self.task, split)) for split in ("train", "test")}

    def _begin(self, identity: dict[str, Any]) -> None:
        """A new run: empty the folder of what an older one left, and begin the log."""
        config, folder = self.config, self.folder
        if self.log.lines and not config.overwrite:
            raise ValueError(f"output {folder} holds a run that another process has begun meanwhile: give another folder")
        # Older curves step aside until the trackers have started: one that refuses shall leave the old run as it was.
        curves = [folder / name for name in CURVES if (folder / name).exists()]
        for path in curves:
            path.rename(f"{path}.old")
        try:
            self.tracker = Tracker(config.report_to, folder, asked(config))
        except BaseException:
            remove(folder / name for name in CURVES)
            for path in curves:
                Path(f"{path}.old").rename(path)
            raise
        # The first line comes last: until it is there, the folder holds no run, and nothing of an older one counts.
        self.log.clear()
        self.journal.clear()
        remove(path for path in folder.iterdir() if is_ours(path.name) and path.name not in ("run.log", "journal", *CURVES))
        write_atomically(folder / "config.json", json.dumps(asked(config), indent=2) + "\n")
        versions = {"torch": torch.__version__, "es_kernels": es_kernels.__version__}
        start = {**start_of(self.model, self.optimizer), "metric": self.task.metric, **self._items()}
        self.log.append({"run": FORMAT, "es_finetune": es_kernels.__version__, "config": asked(config), "model": identity, **start, "versions": versions})

    def _resume(self) -> None:
        """Bring the optimizer to where the log ends, and the files for people with it."""
        config, folder = self.config, self.folder
        header, generations = parse_log(folder / "run.log", self.log.lines)
        check_start(header, self.model, self.optimizer, config.model)
        for split, digest in self._items().items():
            if header[split] != digest:
                raise ValueError(f"the {split.replace('_', ' ')} of task {config.task} are not those that the run in {folder} began with")
        fast_forward(self.optimizer, generations, snapshots=folder / "snapshots")
        for rows, name, least in ((self._rows, "metrics.jsonl", 0), (self._looks, "evals.jsonl", 1)):
            rows += [row for row in read_rows(folder / name) if row["generation"] < len(generations) + least]
            write_atomically(folder / name, "".join(json.dumps(row) + "\n" for row in rows))
        self.tracker = Tracker(config.report_to, folder, asked(config), done=len(generations))
        if len(generations) < config.generations:
            remove([folder / "summary.json"])  # it says that a run is complete
        write_atomically(folder / "config.json", json.dumps(asked(config), indent=2) + "\n")

    # --- the run ------------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Run to the last generation; returns what summary.json holds. Call it once; to go on later, resume."""
        if self.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.model.device)  # of an earlier run of this process
        try:
            with Progress(self.config.generations, self.task.metric) as progress:
                self._run(progress)
            return self._finish()
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the run's folder, for a Trainer that shall not train; `train` does so at its end."""
        self.tracker.close()
        self.log.close()
        self.journal.close()

    def _run(self, progress: Progress) -> None:
        config, optimizer = self.config, self.optimizer
        progress.note(
            f"{self.folder}: {config.task}, {len(self.task.train)} training and {len(self.held_out.items)} held-out prompts; "
            f"{sum(p.numel() for p in self.model.parameters()):,} parameters, backend {self.backend}"
        )
        for note in self.task.notes:
            progress.note(note)
        while True:
            done = optimizer.generation
            if not self._looks or done in (0, config.generations) or (config.eval_every and done % config.eval_every == 0):
                self._look_at_held_out(progress)
            if done >= config.generations:
                return
            row = self._generation()
            self.tracker.log(row, optimizer.generation)
            if len(self._rows) == 1:
                progress.note(estimate(row, self._looks[0], config.generations, config.eval_every))
            for warning in row["warnings"]:
                progress.note(f"generation {row['generation'] + 1}: {warning}")
            progress.update(row, self._looks[-1][self.task.metric], total_seconds(self._rows, self._looks))

    def _generation(self) -> dict[str, Any]:
        """One generation: score the members that the journal does not hold, update, log. Returns its row of metrics.jsonl."""
        config, optimizer = self.config, self.optimizer
        begin, kernels = time.perf_counter(), optimizer.kernel_seconds
        generation = optimizer.generation
        set_schedules(optimizer, config)
        group = dict(optimizer.param_groups[0])
        training = self._training or Evaluator(self.engine, self.task, self._draw(generation))
        stop = config.on_reward_error == "stop"
        known = {line["member"]: line for line in self.journal.lines if line["generation"] == generation and not (stop and None in line["rewards"])}
        # Seconds of an earlier process, which this one's clock does not hold.
        before = math.fsum(line["seconds_generate"] + line["seconds_score"] for line in known.values())
        if not known:
            self.journal.clear()
        looking = bool(config.health_every) and (generation % config.health_every == 0 or generation == config.generations - 1)

        def score(member: int) -> dict[str, Any]:
            if looking and member == 0:
                self.health.look_at_member()
            if member not in known:
                known[member] = member_line(generation, member, training())
                if stop and None in known[member]["rewards"]:
                    raise RewardFailed(f"generation {generation + 1}, member {member}: {known[member]['error']}")
                self.journal.append(known[member])
            return known[member]

        members = optimizer.evaluate(score)
        by_prompt = rewards_by_prompt(self.task, members)
        means = [math.fsum(row) / len(row) for row in by_prompt]
        if looking:
            self.health.look_before_update()
        update = optimizer.tell(by_prompt if config.shaping == "per_prompt" else means)
        theta, live = optimizer.fingerprint("theta"), optimizer.fingerprint("live")
        row = {
            "generation": generation,
            "sigma": group["sigma"],
            "lr": group["lr"],
            **population_row(members, means, before + time.perf_counter() - begin),
            "seconds_kernels": optimizer.kernel_seconds - kernels,
            "theta": f"{theta:016x}",
            "live": f"{live:016x}",
            "peak_memory_bytes": peak_memory(self.model.device),
            **({"health": self.health.look_after_update()} if looking else {}),
        }
        row["warnings"] = warnings_of([*self._rows, row], config, base_reward=self._looks[-1]["reward"])
        append_row(self.folder / "metrics.jsonl", row)
        lr, sigma = (tuple(group[key] for group in optimizer.param_groups) for key in ("lr", "sigma"))
        self.log.append(Generation(generation, update.z, update.scored, update.mean, lr, sigma, theta, live).to_json())
        # From here on the generation is made; what follows can be lost.
        self._rows.append(row)
        if config.snapshot_every and optimizer.generation % config.snapshot_every == 0:
            save_snapshot(self.folder / "snapshots", optimizer)
        return row

    def _draw(self, generation: int) -> list[Item]:
        """The generation's training prompts, the same for all its members: a draw without repetition."""
        draws = random.Random(member_seed(self.config.seed, generation, 0, PROMPT_CHOICE))
        return draws.sample(list(self.task.train), self.config.prompts)

    def _look_at_held_out(self, progress: Progress) -> None:
        """Answer the held-out prompts with theta, unless that is already in evals.jsonl."""
        done = self.optimizer.generation
        if any(look["generation"] == done for look in self._looks):
            return
        begin = time.perf_counter()
        evaluation = self.held_out()
        if evaluation.failed:
            failure = f"held-out answers after {done} updates: scoring failed for {evaluation.failed}; prompt {evaluation.error[0]}: {evaluation.error[1]}"
            if self.config.on_reward_error == "stop" and any(score.reward is None for score in evaluation.scores):
                raise RewardFailed(failure)
            progress.note(failure)
        look = look_row(self.task, evaluation, done, time.perf_counter() - begin)
        (self.folder / "answers").mkdir(exist_ok=True)
        save_answers(self.folder / "answers" / ("tuned.jsonl" if done else "base.jsonl"), self.held_out.items, evaluation.answers, evaluation.scores)
        append_row(self.folder / "evals.jsonl", look)
        self._looks.append(look)
        self.tracker.log(look, done, prefix="held_out")

    def _finish(self) -> dict[str, Any]:
        """Write the model, the plot and the summary, in this order: a folder that has a summary is complete."""
        config, optimizer = self.config, self.optimizer
        found = {
            "task": config.task,
            "model": config.model,
            **summary(self.task.metric, self._rows, self._looks),
            "generations": optimizer.generation,
            "backend": self.backend,
            "noise_version": es_kernels.noise.VERSION,
            "seed": config.seed,
            "fingerprint": f"{optimizer.fingerprint('theta'):016x}",
            "live": f"{optimizer.fingerprint('live'):016x}",
            "log_bytes": (self.folder / "run.log").stat().st_size,
        }
        if config.save_model:
            save_model(self.model, self.tokenizer, self.folder / "model")
        plot_run(self.folder / "reward.png", f"Evolution strategies on {config.task}", self.task.metric, self._rows, self._looks)
        write_atomically(self.folder / "summary.json", json.dumps(found, indent=2) + "\n")
        return found


def _digest(items: Sequence[Item]) -> str:
    return hashlib.blake2b(repr([(item.prompt, item.key) for item in items]).encode("utf-8", "backslashreplace"), digest_size=8).hexdigest()


