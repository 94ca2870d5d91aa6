"""One ES run in a folder: load, measure, train, measure again, write; or continue where a killed one stopped.

What the folder holds is in README ("A run is a folder"). run.log and journal decide how a run continues (runlog.py); all
other files are for people and can be made again from them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
import resource
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import es_kernels
from es_finetune.config import FREE, TrainConfig, asked, model_options
from es_finetune.engines.hf import HFEngine
from es_finetune.evaluate import Evaluation, Evaluator
from es_finetune.files import append_row, read_rows, write_atomically
from es_finetune.health import Health, warnings_of
from es_finetune.measure import headline, interval, rewards, save_answers
from es_finetune.model import load_model, pick_device, save_model
from es_finetune.plot import plot_run
from es_finetune.progress import Progress, duration
from es_finetune.replay import check_start, config_of, fast_forward, start_of
from es_finetune.runlog import FORMAT, Generation, SealedLines, is_begun, parse_log, read_log
from es_finetune.snapshot import save_snapshot
from es_finetune.tasks import Item, Task, load_task
from es_finetune.tracking import Tracker, require
from es_finetune.tuning import make_optimizer, set_schedules
from es_kernels.noise import PROMPT_CHOICE, member_seed

# All that a run may leave in its folder. Another name in it means that the folder is somebody else's.
FILES = ("config.json", "run.log", "journal", "metrics.jsonl", "evals.jsonl", "summary.json", "reward.png", "report.html")
FOLDERS = ("answers", "snapshots", "model")
CURVES = ("tensorboard", "wandb", "wandb-id")  # of trackers


class RewardFailed(RuntimeError):
    """A reward raised, hung or returned no number, and the run was asked to stop then."""


class Trainer:
    """Everything a run needs, made and checked before it starts; `train` does the work.

    config:            what to do. Its `model` and `task` are loaded, unless objects are given:
    model, tokenizer:  a causal LM of transformers (its parameters that require grad are tuned, in place) and its tokenizer,
                       which must pad on the left. config.model is then only the name in the log.
    task:              any object with the attributes of tasks.Task, as load_task("custom", data=[...], reward=function).

    A bad config, model, task or folder raises ValueError or OSError from the constructor, before any long work.
    """

    def __init__(self, config: TrainConfig, *, model=None, tokenizer=None, task: Task | None = None):
        self.config = config
        self.folder = Path(config.output)
        self._claim_folder()
        require(config.report_to)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.task = task or load_task(config.task, data=config.data, test_data=config.test_data, reward=config.reward, time_limit=config.time_limit)
        if config.prompts > len(self.task.train):
            raise ValueError(f"prompts must be at most {len(self.task.train)}, the training prompts of {config.task}, not {config.prompts}")
        if (model is None) != (tokenizer is None):
            raise ValueError("give model and tokenizer together, or neither to load the config's")
        if model is None:
            model, tokenizer, identity = load_model(config.model, device=pick_device(config.device), **model_options(config))
        else:
            identity = {"name": config.model, "class": type(model).__name__, "in_memory": True}
        self.model, self.tokenizer = model, tokenizer
        self.engine = HFEngine(model, tokenizer, config.max_new_tokens or self.task.max_new_tokens, config.batch_size, path=config.decoding)
        self.optimizer = make_optimizer(model, config)
        self.backend = es_kernels.active_backend(model.device)
        self.held_out = Evaluator(self.engine, self.task, self.task.test[: config.eval_items or None])
        self._training = None if config.prompts else Evaluator(self.engine, self.task, self.task.train)
        self._rows: list[dict[str, Any]] = []
        self._looks: list[dict[str, Any]] = []
        self.health = Health(self.optimizer)  # before resuming: it counts the drift from here
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = SealedLines(self.folder / "run.log")
        try:
            self._resume() if config.resume else self._begin(identity)
        except BaseException:
            self.log.close()
            raise

    # --- the folder ---------------------------------------------------------------------------------------------------

    def _claim_folder(self) -> None:
        """ValueError unless the folder is new or empty, or holds a run that is to be continued or replaced."""
        folder, config = self.folder, self.config
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"output {folder} is a file: give a folder")
        if is_begun(folder / "run.log"):
            if not (config.resume or config.overwrite):
                raise ValueError(f"output {folder} holds a run: --resume continues it, --overwrite replaces it, --output gives another folder")
            if config.resume:
                header, generations = read_log(folder / "run.log")
                _refuse_other_config(config, config_of(header, folder), len(generations))
        elif config.resume:
            raise ValueError(f"output {folder} holds no run to resume: leave out --resume, or give the folder of a run")
        else:
            names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
            foreign = [name for name in names if not _is_ours(name)]
            if foreign:
                raise ValueError(f"output {folder} holds {foreign[0]}, which is no part of a run: give another folder")

    def _start(self) -> dict[str, Any]:
        """What must be the same where a run is resumed."""
        splits = {f"{name}_items": _digest(items) for name, items in (("train", self.task.train), ("test", self.task.test))}
        return {**start_of(self.model, self.optimizer), "metric": self.task.metric, **splits}

    def _begin(self, identity: dict[str, Any]) -> None:
        """A new run: empty the folder of what an older one left, and begin the log."""
        config, folder = self.config, self.folder
        if self.log.lines and not config.overwrite:
            raise ValueError(f"output {folder} holds a run that another process has begun meanwhile: give another folder")
        _remove(folder / name for name in CURVES)
        self.tracker = Tracker(config.report_to, folder, asked(config))
        # The first line comes last: until it is there, the folder holds no run, and nothing of an older one counts.
        self.log.clear()
        _remove(path for path in folder.iterdir() if _is_ours(path.name) and path.name not in ("run.log", *CURVES))
        write_atomically(folder / "config.json", json.dumps(asked(config), indent=2) + "\n")
        self.journal = SealedLines(folder / "journal", sync=False)
        versions = {"torch": torch.__version__, "es_kernels": es_kernels.__version__}
        self.log.append({"run": FORMAT, "es_finetune": es_kernels.__version__, "config": asked(config), "model": identity, **self._start(), "versions": versions})

    def _resume(self) -> None:
        """Bring the optimizer to where the log ends, and the files for people with it."""
        config, folder = self.config, self.folder
        header, generations = parse_log(folder / "run.log", self.log.lines)
        check_start(header, self.model, self.optimizer, config.model)
        for split in ("train", "test"):
            if header[f"{split}_items"] != self._start()[f"{split}_items"]:
                raise ValueError(f"the {split} items of task {config.task} are not those that the run in {folder} began with")
        fast_forward(self.optimizer, generations, snapshots=folder / "snapshots")
        for rows, name, least in ((self._rows, "metrics.jsonl", 0), (self._looks, "evals.jsonl", 1)):
            rows += [row for row in read_rows(folder / name) if row["generation"] < len(generations) + least]
            write_atomically(folder / name, "".join(json.dumps(row) + "\n" for row in rows))
        if len(generations) < config.generations:
            _remove([folder / "summary.json"])  # it says that a run is complete
        self.journal = SealedLines(folder / "journal", sync=False)
        self.tracker = Tracker(config.report_to, folder, asked(config), done=len(generations))

    # --- the run ------------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Run to the last generation; returns what summary.json holds. Call it once; to go on later, resume."""
        try:
            with Progress(self.config.generations, self.task.metric) as progress:
                self._run(progress)
            return self._finish()
        finally:
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
                self._look_at_held_out()
            if done >= config.generations:
                return
            row = self._generation()
            self.tracker.log(row, optimizer.generation)
            if len(self._rows) == 1:
                progress.note(self._estimate(row))
            for warning in row["warnings"]:
                progress.note(f"generation {row['generation'] + 1}: {warning}")
            progress.update(row, self._looks[-1][self.task.metric], self._seconds())

    def _generation(self) -> dict[str, Any]:
        """One generation: score the members that the journal does not hold, update, log. Returns its row of metrics.jsonl."""
        config, optimizer = self.config, self.optimizer
        begin, kernels = time.perf_counter(), optimizer.kernel_seconds
        generation = optimizer.generation
        set_schedules(optimizer, config)
        group = dict(optimizer.param_groups[0])
        training = self._training or Evaluator(self.engine, self.task, self._draw(generation))
        stop = config.on_reward_error == "stop"
        known = {line["member"]: line for line in self.journal.lines if line["generation"] == generation and not (stop and line["error"])}
        # Seconds of an earlier process, which this one's clock does not hold.
        before = math.fsum(line["seconds_generate"] + line["seconds_score"] for line in known.values())
        if not known:
            self.journal.clear()
        looking = bool(config.health_every) and (generation % config.health_every == 0 or generation == config.generations - 1)

        def score(member: int) -> dict[str, Any]:
            if looking and member == 0:
                self.health.look_at_member()
            if member not in known:
                known[member] = {"generation": generation, "member": member, **_line(training())}
                if stop and known[member]["error"] is not None:
                    raise RewardFailed(f"generation {generation + 1}, member {member}: {known[member]['error']}")
                self.journal.append(known[member])
            return known[member]

        members = optimizer.evaluate(score)
        if looking:
            self.health.look_before_update()
        floor = _floor(self.task, members)
        by_prompt = [[floor if reward is None else reward for reward in member["rewards"]] for member in members]
        means = [math.fsum(row) / len(row) for row in by_prompt]
        update = optimizer.tell(by_prompt if config.shaping == "per_prompt" else means)
        theta, live = optimizer.fingerprint("theta"), optimizer.fingerprint("live")
        lr, sigma = (tuple(group[key] for group in optimizer.param_groups) for key in ("lr", "sigma"))
        digests = [member["digest"] for member in members]
        seconds = before + time.perf_counter() - begin
        generating, scoring = (math.fsum(member[key] for member in members) for key in ("seconds_generate", "seconds_score"))
        tokens = sum(member["tokens"] for member in members)
        row = {
            "generation": generation,
            "reward_mean": update.mean,
            "reward_std": math.sqrt(math.fsum((mean - update.mean) ** 2 for mean in means) / len(means)),
            "reward_min": min(means),
            "reward_max": max(means),
            **{f"{part}_mean": _mean([member[part] for member in members]) for part in ("exact", "format")},
            "sigma": group["sigma"],
            "lr": group["lr"],
            "seconds": seconds,
            "seconds_generate": generating,
            "seconds_score": scoring,
            "seconds_kernels": optimizer.kernel_seconds - kernels,
            "share_outside": max(0.0, 1 - (generating + scoring) / seconds),
            "tokens": tokens,
            "tokens_per_second": tokens / generating if generating else 0.0,
            "identical": sum(digests.count(digest) > 1 for digest in digests) / len(digests),
            "failed": sum(member["failed"] for member in members),
            "failed_example": next((member["error"] for member in members if member["error"] is not None), None),
            "theta": f"{theta:016x}",
            "live": f"{live:016x}",
            "peak_memory_bytes": _peak_memory(self.model.device),
            **({"health": self.health.look_after_update()} if looking else {}),
        }
        row["warnings"] = warnings_of([*self._rows, row], config, base_reward=self._looks[-1]["reward"])
        append_row(self.folder / "metrics.jsonl", row)
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

    def _look_at_held_out(self) -> None:
        """Answer the held-out prompts with theta, unless that is already in evals.jsonl."""
        done = self.optimizer.generation
        if any(look["generation"] == done for look in self._looks):
            return
        begin = time.perf_counter()
        evaluation = self.held_out()
        values, paid = headline(self.task, evaluation.scores), rewards(self.task, evaluation.scores)
        low, high = interval(values, binary=set(values) <= {0.0, 1.0})
        look = {
            "generation": done,
            "items": len(values),
            "reward": math.fsum(paid) / len(paid),
            "exact": evaluation.mean("exact"),
            "format": evaluation.mean("format"),
            "failed": evaluation.failed,
            self.task.metric: math.fsum(values) / len(values),
            "low": low,
            "high": high,
            "seconds": time.perf_counter() - begin,
        }
        (self.folder / "answers").mkdir(exist_ok=True)
        save_answers(self.folder / "answers" / ("tuned.jsonl" if done else "base.jsonl"), self.held_out.items, evaluation.answers, evaluation.scores)
        append_row(self.folder / "evals.jsonl", look)
        self._looks.append(look)
        self.tracker.log(look, done, prefix="held_out")

    def _finish(self) -> dict[str, Any]:
        """Write the model, the plot and the summary, in this order: a folder that has a summary is complete."""
        config = self.config
        metric, last = self.task.metric, self._looks[-1]
        first = next((look for look in self._looks if look["generation"] == 0), {metric: None, "low": None, "high": None})
        whole = math.fsum(row["seconds"] for row in self._rows)
        seconds = self._seconds()
        parts = {key: math.fsum(row[key] for row in self._rows) for key in ("seconds_generate", "seconds_score", "seconds_kernels")}
        summary = {
            "task": config.task,
            "model": config.model,
            "metric": metric,
            "base": first[metric],
            "base_interval": [first["low"], first["high"]],
            "final": last[metric],
            "final_interval": [last["low"], last["high"]],
            "held_out": last["items"],
            "held_out_curve": [[look["generation"], look[metric]] for look in self._looks],
            "generations": self.optimizer.generation,
            "seconds_total": seconds,
            **parts,
            "share_outside": 1 - (parts["seconds_generate"] + parts["seconds_score"]) / whole if whole else None,
            "tokens": sum(row["tokens"] for row in self._rows),
            "backend": self.backend,
            "noise_version": es_kernels.noise.VERSION,
            "seed": config.seed,
            "fingerprint": f"{self.optimizer.fingerprint('theta'):016x}",
            "live": f"{self.optimizer.fingerprint('live'):016x}",
            "log_bytes": (self.folder / "run.log").stat().st_size,
        }
        if config.save_model:
            save_model(self.model, self.tokenizer, self.folder / "model")
        plot_run(self.folder / "reward.png", f"Evolution strategies on {config.task}", metric, self._rows, self._looks)
        write_atomically(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        return summary

    def _seconds(self) -> float:
        return math.fsum([*(row["seconds"] for row in self._rows), *(look["seconds"] for look in self._looks)])

    def _estimate(self, row: dict[str, Any]) -> str:
        """What the first generation says of the whole run."""
        config = self.config
        looks = 2 + ((config.generations - 1) // config.eval_every if config.eval_every else 0)
        seconds = row["seconds"] * config.generations + self._looks[0]["seconds"] * looks
        return (
            f"estimate: {duration(seconds)} for {config.generations} generations of {row['seconds']:.1f} s and {looks} looks at the held-out prompts "
            f"of {self._looks[0]['seconds']:.1f} s; peak memory so far {row['peak_memory_bytes'] / 2**30:.1f} GiB"
        )


def _line(evaluation: Evaluation) -> dict[str, Any]:
    """What the journal keeps of a member's evaluation: all that the generation's update and metrics need."""
    error = evaluation.error
    return {
        "rewards": [score.reward for score in evaluation.scores],
        "exact": evaluation.mean("exact"),
        "format": evaluation.mean("format"),
        "digest": evaluation.digest,
        "tokens": evaluation.tokens,
        "failed": evaluation.failed,
        "error": None if error is None else f"prompt {error[0]}: {error[1]}",
        "seconds_generate": evaluation.seconds_generate,
        "seconds_score": evaluation.seconds_score,
    }


def _floor(task: Task, members: Sequence[dict[str, Any]]) -> float:
    """The reward of an answer whose scoring failed: the task's, else the lowest of the generation, else 0."""
    if task.floor is not None:
        return task.floor
    return min((reward for member in members for reward in member["rewards"] if reward is not None), default=0.0)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _digest(items: Sequence[Item]) -> str:
    return hashlib.blake2b(repr([(item.prompt, item.key) for item in items]).encode("utf-8", "backslashreplace"), digest_size=8).hexdigest()


def _is_ours(name: str) -> bool:
    """Whether a run, or eval of it, leaves something of this name in its folder."""
    return name.removesuffix(".tmp").removesuffix(".old") in FILES + FOLDERS + CURVES or name.startswith("eval-")


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's allocator, or of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _refuse_other_config(here: TrainConfig, then: TrainConfig, done: int) -> None:
    """ValueError if a resumed run would not be the run that was begun."""
    for field in dataclasses.fields(TrainConfig):
        name, was, now = field.name, getattr(then, field.name), getattr(here, field.name)
        if name in FREE or was == now:
            continue
        if name == "generations" and now >= done and "constant" == here.lr_schedule == here.sigma_schedule:
            continue  # only then does the number of generations decide nothing before its end
        raise ValueError(f"the run was begun with {name} {was!r}, not {now!r}: resume it with that, or begin another run in another folder")
