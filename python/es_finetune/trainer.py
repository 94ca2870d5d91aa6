"""One ES run from a config to a folder: load, measure, train, measure again, write.

The folder holds config.json (what was asked for), metrics.jsonl (one object per generation, written as it ends), and at
the end summary.json, reward.png and model/ (weights, tokenizer, generation config as `save_pretrained` writes them).
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import es_kernels
from es_finetune.evaluate import Evaluation, Evaluator, HFEngine
from es_finetune.optimizer import EvolutionStrategy
from es_finetune.progress import Progress
from es_finetune.segments import named_segments
from es_finetune.tasks import Item, load_task
from es_kernels.noise import PROMPT_CHOICE, member_seed

EMBEDDED_MODEL = Path(__file__).parent / "models" / "countdown_char"

# What a flag left out means: the paper's run, or for the embedded model the demo. There sigma 0.01 costs a member 4 of 87
# points of exact plain answers and 0.02 costs 14; threads=1 because a model this small gains nothing from a second one, and
# with two a busy neighbour on either core makes every small matrix product wait (10 times slower in a trial).
PAPER = {"sigma": 1e-3, "lr": 5e-4, "generations": 500, "prompts": 0, "eval_every": 25, "batch_size": 100, "threads": 0}
DEMO = {"sigma": 0.01, "lr": 0.01, "generations": 30, "prompts": 128, "eval_every": 5, "batch_size": 128, "threads": 1}


def _flag(help: str, default: Any = None):
    return field(default=default, metadata={"help": help})


def _preset(name: str, help: str):
    return _flag(f"{help}; {DEMO[name]} with the embedded model, else {PAPER[name]}")


@dataclass
class TrainConfig:
    """One run. A value of None is filled in when the config is made: the demo's where the model is the embedded one, else
    the paper's."""

    output: str = field(metadata={"help": "folder of the run; a run of the same config in it is done again"})
    task: str = _flag("what to learn: countdown-char or countdown", "countdown-char")
    model: str | None = _flag("folder or hub name of a causal LM; countdown-char brings its own")
    population: int = _flag("members per generation", 30)
    generations: int | None = _preset("generations", "how many updates")
    sigma: float | None = _preset("sigma", "scale of the noise")
    lr: float | None = _preset("lr", "scale of the update")
    weight_decay: float = _flag("per update, times lr", 0.0)
    anchored: bool = _flag("decay toward the initial weights instead of zero", False)
    antithetic: bool = _flag("members in pairs of opposite noise", False)
    base: str = _flag("where the exact weights live: fp32, copy or none", "fp32")
    prompts: int | None = _preset("prompts", "training prompts per generation, drawn anew each time; 0: all of them, always")
    batch_size: int | None = _preset("batch_size", "prompts per call of generate")
    max_new_tokens: int | None = _flag("length of an answer; the task's own if not given")
    eval_every: int | None = _preset("eval_every", "generations between looks at the held-out prompts; 0: only first and last")
    eval_items: int = _flag("how many held-out prompts; 0: all", 0)
    seed: int = _flag("of the whole run", 0)
    threads: int | None = _preset("threads", "CPU threads; 0: torch's choice")
    device: str = _flag("cpu, cuda, cuda:1, ...; auto: cuda if there is one", "auto")
    overwrite: bool = _flag("replace a run of another config in the output folder", False)

    def __post_init__(self):
        if self.model is None:
            if self.task == "countdown":
                raise ValueError("task 'countdown' needs a model: give --model with a folder or hub name")
            self.model = "embedded"
        for name, value in (DEMO if self.model == "embedded" else PAPER).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name, least in (("generations", 1), ("batch_size", 1), ("prompts", 0), ("eval_every", 0), ("eval_items", 0), ("threads", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.base not in ("fp32", "copy", "none"):
            raise ValueError(f"base must be fp32, copy or none, not {self.base!r}")
        # The optimizer checks its own options; asked here of one weight, before a large model is read from disk.
        EvolutionStrategy([("probe", torch.nn.Parameter(torch.zeros(1)))], **self.es_options())

    def es_options(self) -> dict[str, Any]:
        names = ("sigma", "lr", "weight_decay", "anchored", "population", "seed", "antithetic")
        return {"base": None if self.base == "none" else self.base, **{name: getattr(self, name) for name in names}}


class Trainer:
    """Everything a run needs, made and checked before it starts; `run` does the work.

    A bad config, model or folder raises ValueError or OSError from the constructor.
    """

    def __init__(self, config: TrainConfig):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.config = config
        self.task = load_task(config.task)
        if config.prompts > len(self.task.train):
            raise ValueError(f"prompts must be at most {len(self.task.train)}, the training prompts of {config.task}, not {config.prompts}")
        self.folder = Path(config.output)
        _refuse_other_contents(self.folder, config)
        device = _device(config.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        path = str(EMBEDDED_MODEL) if config.model == "embedded" else config.model
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
            self.model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").to(device).eval()
        except (ValueError, OSError) as error:  # transformers' own words can be a page
            raise ValueError(f"model {path} could not be loaded: {str(error).splitlines()[0]}") from error
        self.engine = HFEngine(self.model, self.tokenizer, config.max_new_tokens or self.task.max_new_tokens, config.batch_size)
        self.optimizer = EvolutionStrategy(named_segments(self.model), **config.es_options())
        self.backend = es_kernels.active_backend(self.model.device)
        _begin(self.folder, config)

    def run(self) -> dict[str, Any]:
        """Train; returns what summary.json holds."""
        config, optimizer = self.config, self.optimizer
        start = time.perf_counter()
        held_out = Evaluator(self.engine, self.task, self.task.test[: config.eval_items or None])
        curve = [(0, held_out().mean("exact"))]  # (updates done, share of held-out prompts answered exactly)
        rows: list[dict[str, Any]] = []
        training = None
        with Progress(config.generations) as progress, open(self.folder / "metrics.jsonl", "w") as metrics:
            progress.note(
                f"{config.task}: {len(held_out.items)} held-out prompts, exact {curve[0][1]:.3f} before; "
                f"{sum(p.numel() for p in self.model.parameters()):,} parameters, backend {self.backend}"
            )
            for generation in range(config.generations):
                if training is None or config.prompts:
                    training = Evaluator(self.engine, self.task, self._draw(generation))
                row = self._generation(training)
                rows.append(row)
                metrics.write(json.dumps(row) + "\n")
                metrics.flush()
                done = generation + 1
                if done == config.generations or (config.eval_every and done % config.eval_every == 0):
                    curve.append((done, held_out().mean("exact")))
                seconds = time.perf_counter() - start
                progress.update(row, curve[-1][1], seconds, optimizer.kernel_seconds / seconds)
        summary = {
            "task": config.task,
            "model": config.model,
            "base_exact": curve[0][1],
            "final_exact": curve[-1][1],
            "held_out": len(held_out.items),
            "held_out_exact": curve,
            "generations": config.generations,
            "seconds_total": time.perf_counter() - start,
            "seconds_generate": sum(row["seconds_generate"] for row in rows),
            "seconds_score": sum(row["seconds_score"] for row in rows),
            "seconds_kernels": optimizer.kernel_seconds,
            "backend": self.backend,
            "noise_version": es_kernels.noise.VERSION,
            "seed": config.seed,
            "fingerprint": f"{optimizer.fingerprint():016x}",
        }
        self._leave(summary, rows, curve)
        return summary

    def _draw(self, generation: int) -> list[Item]:
        """The generation's training prompts, the same for all its members: all, or a draw without repetition."""
        if not self.config.prompts:
            return list(self.task.train)
        draws = random.Random(member_seed(self.config.seed, generation, 0, PROMPT_CHOICE))
        return draws.sample(self.task.train, self.config.prompts)

    def _generation(self, training: Evaluator) -> dict[str, Any]:
        """One step of the optimizer, as a row of metrics.jsonl."""
        optimizer = self.optimizer
        start, kernels = time.perf_counter(), optimizer.kernel_seconds
        members: list[Evaluation] = []

        def reward() -> float:
            members.append(training())
            return members[-1].mean("reward")

        generation, group = optimizer.generation, dict(optimizer.param_groups[0])
        mean = optimizer.step(reward)
        rewards = [member.mean("reward") for member in members]
        return {
            "generation": generation,
            "reward_mean": mean,
            "reward_std": (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5,
            "reward_min": min(rewards),
            "reward_max": max(rewards),
            "exact_mean": sum(member.mean("exact") for member in members) / len(members),
            "format_mean": sum(member.mean("format") for member in members) / len(members),
            "sigma": group["sigma"],
            "lr": group["lr"],
            "seconds": time.perf_counter() - start,
            "seconds_generate": sum(member.seconds_generate for member in members),
            "seconds_score": sum(member.seconds_score for member in members),
            "seconds_kernels": optimizer.kernel_seconds - kernels,
            "theta": f"{optimizer.fingerprint('theta'):016x}",
            "live": f"{optimizer.fingerprint('live'):016x}",
        }

    def _leave(self, summary: dict[str, Any], rows: list[dict[str, Any]], curve: list[tuple[int, float]]) -> None:
        from es_finetune.plot import plot_run

        part = self.folder / "model.tmp"
        self.model.save_pretrained(part)
        self.tokenizer.save_pretrained(part)
        os.replace(part, self.folder / "model")
        plot_run(self.folder / "reward.png", self.config.task, rows, curve)
        _write(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")  # last: a folder that has it is complete


def train(config: TrainConfig) -> dict[str, Any]:
    """Run `config`; returns what summary.json holds."""
    return Trainer(config).run()


def _asked(config: TrainConfig) -> dict[str, Any]:
    """What config.json holds: all that decides the run."""
    asked = dataclasses.asdict(config)
    del asked["output"], asked["overwrite"]
    return asked


def _refuse_other_contents(folder: Path, config: TrainConfig) -> None:
    """ValueError unless `folder` is new, empty, or holds a run of the same config (of any, with overwrite)."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output {folder} is a file: give a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    try:
        found = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or found.keys() != _asked(config).keys():
        raise ValueError(f"output {folder} holds files that are no run of es_finetune: give another folder")
    if found != _asked(config) and not config.overwrite:
        raise ValueError(f"output {folder} holds a run of another config: give another folder, or --overwrite to replace that run")


def _begin(folder: Path, config: TrainConfig) -> None:
    """Make the folder, without what an earlier run left."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("summary.json", "metrics.jsonl", "reward.png"):
        (folder / name).unlink(missing_ok=True)
    for name in ("model", "model.tmp"):
        shutil.rmtree(folder / name, ignore_errors=True)
    _write(folder / "config.json", json.dumps(_asked(config), indent=2) + "\n")


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is unknown to torch: give auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but torch sees no GPU: give --device cpu")
    return device


def _write(path: Path, text: str) -> None:
    """Whole or not at all: a reader never sees half a file."""
    part = path.with_name(path.name + ".tmp")
    part.write_text(text)
    os.replace(part, path)
