"""What a user can ask for: the dataclasses behind the commands' flags, YAML files and the Python API."""

from __future__ import annotations

import dataclasses
import functools
import os
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from es_finetune.engines import DECODINGS
from es_finetune.errors import UserError, did_you_mean
from es_finetune.models import WEIGHT_DTYPES
from es_finetune.optim.options import COUNT, f32_positive, finite, is_bool, seed64, whole
from es_finetune.tasks import NAMES

# What a flag left out means: the paper's run, or for the embedded model the demo. There sigma 0.01 costs a member 4 of
# 87 points of exact plain answers and 0.02 costs 14; threads=1 because a model this small gains nothing from a second
# one, and with two a busy neighbour on either core makes every small matrix product wait (10 times slower in a trial).
PAPER = {"sigma": 1e-3, "lr": 5e-4, "generations": 500, "prompts": 0, "eval_every": 25, "batch_size": 100, "threads": 0}
DEMO = {"sigma": 0.01, "lr": 0.01, "generations": 30, "prompts": 128, "eval_every": 5, "batch_size": 128, "threads": 1}

MAX_THREADS = 1024  # torch still runs with 4096 of them on 2 cores; with 100,000 the process crashes
# Of a custom task that has more: 30 members give 3,840 answers a generation, however long the file is
CUSTOM_PROMPTS = 128

SCHEDULES = ("constant", "linear", "cosine")


# In a field's metadata: its help, and whether it is resumable. A resumable option may differ when a run goes on: it
# decides where, how fast and how closely watched the run is, not what its log holds, since equal scores give equal
# weights anywhere. Model, data and reward are resumable because the log knows them by fingerprint and digest.
def _flag(help: str, default: Any = None, *, resumable: bool = False) -> Any:
    return field(default=default, metadata={"help": help, "resumable": resumable})


def _list(help: str, *default: str, resumable: bool = False) -> Any:
    return field(default_factory=lambda: list(default), metadata={"help": help, "resumable": resumable})


def _preset(name: str, help: str, *, resumable: bool = False) -> Any:
    return _flag(f"{help}; {DEMO[name]} with the embedded model, else {PAPER[name]}", resumable=resumable)


@dataclass
class TaskConfig:
    """What is asked and how answers are scored."""

    task: str | None = _flag(
        "countdown, conciseness, math, reasoning-gym:NAME, countdown-char, or custom: your --data and --reward"
    )
    data: str | None = _flag(
        "training items: a .jsonl file with one object a line that has a prompt (custom), or a dataset's name or "
        "folder (math)",
        resumable=True,
    )
    test_data: str | None = _flag(
        "held-out items, in the form of --data; left out: a share of --data (custom), MATH-500 (math)", resumable=True
    )
    reward: str | None = _flag(
        "your reward, FILE.py:FUNCTION or MODULE:FUNCTION, called as reward(completion, item) in a process of its own",
        resumable=True,
    )
    time_limit: float = _flag(
        "seconds after which the scoring of one answer is stopped, where it runs in a process of its own",
        5.0,
        resumable=True,
    )
    max_new_tokens: int | None = _flag("length of an answer; the task's own if not given")


@dataclass
class ModelConfig:
    """The model and where it computes."""

    model: str | None = _flag(
        "folder or hub name of a causal LM or of a PEFT adapter; countdown-char brings its own", resumable=True
    )
    dtype: str = _flag("auto (as saved), float32, bfloat16 or float16", "auto")
    lora_rank: int = _flag("tune a new LoRA adapter of this rank instead of the weights; 0: no adapter", 0)
    pad_token: str | None = _flag("an existing token to pad with, for a tokenizer that has none")
    batch_size: int | None = _preset("batch_size", "prompts per call of generate", resumable=True)
    decoding: str = _flag(
        "how transformers generates: dynamic, static (compiled on a GPU) or continuous (continuous batching)",
        "dynamic",
        resumable=True,
    )
    attn_implementation: str | None = _flag(
        "transformers' attention, e.g. sdpa or flash_attention_2; its own choice if not given", resumable=True
    )
    threads: int | None = _preset("threads", "CPU threads; 0: torch's choice", resumable=True)
    device: str = _flag("cpu, cuda, cuda:1, ...; auto: cuda if there is one", "auto", resumable=True)


class Setup(ModelConfig, TaskConfig):
    """A model on a task: what training, evaluating and calibrating begin with."""

    @property
    def label(self) -> str:
        """Task and model as one part of a path."""
        return f"{self.task}-{Path(self.model).name}".replace(":", "-")

    def fill(self) -> None:
        """Replace each None that has a default by it, and check. ValueError for what is missing or wrong."""
        make_plain(self)
        if self.task is None:
            self.task = (
                "custom" if self.data or self.reward else "countdown-char" if self.model in (None, "embedded") else None
            )
            if self.task is None:
                raise UserError(
                    "no task was given: add --task, e.g. countdown, or --data FILE.jsonl and --reward FILE.py:FUNCTION"
                )
        if self.model is None:
            if self.task != "countdown-char":
                meant = did_you_mean(self.task, NAMES) if self.task not in NAMES else ""
                raise UserError(
                    f"task {self.task!r} needs a model{meant or ': give --model with a folder or hub name'}"
                )
            self.model = "embedded"
        for name, value in (DEMO if self.model == "embedded" else PAPER).items():
            # Whose number depends on its data
            if getattr(self, name, value) is None and (name, self.task) != ("prompts", "custom"):
                setattr(self, name, value)
        at_least(self, lora_rank=0, batch_size=1, threads=0)
        at_most(self, threads=MAX_THREADS)
        one_of(self, decoding=DECODINGS, dtype=WEIGHT_DTYPES)
        if self.time_limit <= 0:
            raise UserError(f"time_limit must be a positive number of seconds, not {self.time_limit}")
        if self.max_new_tokens is not None:
            at_least(self, max_new_tokens=1)


@dataclass
class TrainConfig(Setup):
    """One run. A value of None is filled in when the config is made: the demo's where the model is the embedded one,
    else the paper's (arXiv:2509.24372)."""

    output: str | None = _flag("folder of the run; runs/TASK-MODEL if not given", resumable=True)
    generations: int | None = _preset("generations", "how many updates")
    population: int = _flag("members per generation", 30)
    sigma: float | None = _preset("sigma", "scale of the noise")
    lr: float | None = _preset("lr", "scale of the update")
    sigma_schedule: str = _flag(
        "constant, linear or cosine: sigma falls from its value to final_scale times it", "constant"
    )
    lr_schedule: str = _flag("the same for lr", "constant")
    final_scale: float = _flag("where the schedules end", 0.1)
    shaping: str = _flag(
        "rewards to coefficients: zscore, ranks (centred ranks) or per_prompt (z-scores for each prompt, averaged)",
        "zscore",
    )
    antithetic: bool = _flag("members in pairs of opposite noise", False)
    momentum: float = _flag("of past updates, 0 <= momentum < 1; kept as seeds and coefficients, not as a tensor", 0.0)
    momentum_window: int = _flag("generations that momentum remembers", 8)
    weight_decay: float = _flag("per update, times lr", 0.0)
    anchored: bool = _flag("decay toward the initial weights instead of zero", False)
    base: str = _flag("where the exact weights live: fp32, copy, host or none", "fp32")
    perturb_rounding: str = _flag("nearest or stochastic, of perturbed weights", "nearest")
    update_rounding: str | None = _flag(
        "nearest or stochastic, of the update; stochastic with base copy and none, else nearest"
    )
    tune: list[str] = _list("name patterns (as *.mlp.*) of the parameters to tune; all if not given")
    freeze: list[str] = _list("name patterns of parameters to leave out")
    sigma_for: list[str] = _list(
        "PATTERN=SIGMA: another sigma for the parameters of these names; the first that fits counts"
    )
    prompts: int | None = _flag(
        "training prompts per generation, drawn anew each time, the same for all members; 0: all of them; "
        f"{DEMO['prompts']} with the embedded model, {CUSTOM_PROMPTS} with a custom task (all, if it has fewer), else "
        f"{PAPER['prompts']}"
    )
    seed: int = _flag("of the whole run", 0)
    eval_every: int | None = _preset(
        "eval_every", "generations between evals on the held-out prompts; 0: only first and last", resumable=True
    )
    eval_items: int = _flag("how many held-out prompts; 0: all", 0, resumable=True)
    health_every: int = _flag(
        "generations between measurements of the realised noise and step and of the distance from the base model; 0: "
        "never",
        10,
        resumable=True,
    )
    snapshot_every: int = _flag(
        "generations between snapshots of the exact weights, which make resuming faster; 0: none, the log is enough",
        0,
        resumable=True,
    )
    save_model: bool = _flag("write the tuned model at the end", True, resumable=True)
    report_to: list[str] = _list("tensorboard, wandb, trackio or none", "tensorboard", resumable=True)
    on_reward_error: str = _flag(
        "floor: an answer whose reward fails gets the lowest reward; stop: the run ends", "floor", resumable=True
    )
    engine: str = _flag("what generates: hf (transformers, in this process) or vllm", "hf", resumable=True)
    tensor_parallel: int = _flag("GPUs that hold one copy of the model, with engine vllm", 1, resumable=True)
    workers: str = _flag(
        "alone, or ray: a pool of actors in the Ray cluster of RAY_ADDRESS, or of this machine; torchrun needs no flag",
        "alone",
        resumable=True,
    )
    ray_workers: int = _flag("how many actors; 0: one for each GPU of the cluster", 0, resumable=True)
    straggler_limit: float = _flag(
        "seconds after which a member that is still out is given to another worker too, with workers ray; 0: wait",
        0.0,
        resumable=True,
    )
    on_straggler: str = _flag(
        "reissue, or drop: then the member is left out of its generation", "reissue", resumable=True
    )
    resume: bool = _flag(
        "continue the run in the output folder; its config counts, and flags may only repeat it or change how it is "
        "watched",
        False,
        resumable=True,
    )
    overwrite: bool = _flag("replace the run in the output folder", False, resumable=True)

    def __post_init__(self):
        self.fill()
        if self.output is None:
            self.output = str(Path("runs") / self.label)
        at_most(self, generations=COUNT)
        at_least(
            self,
            tensor_parallel=1,
            ray_workers=0,
            straggler_limit=0,
            generations=1,
            eval_every=0,
            eval_items=0,
            health_every=0,
            snapshot_every=0,
        )
        if self.prompts is not None:
            at_least(self, prompts=0)
        one_of(self, engine=("hf", "vllm"), workers=("alone", "ray"), on_straggler=("reissue", "drop"))
        if self.engine == "hf" and self.tensor_parallel > 1:
            raise UserError("tensor_parallel goes with --engine vllm")
        one_of(
            self,
            base=("fp32", "copy", "host", "none"),
            sigma_schedule=SCHEDULES,
            lr_schedule=SCHEDULES,
            on_reward_error=("floor", "stop"),
        )
        if not 0 < self.final_scale <= 1:
            raise UserError(f"final_scale must be in (0, 1], not {self.final_scale}")
        if not self.lr:
            raise UserError("lr must be a positive number, not 0: with it no generation would change the weights")
        own_sigmas(self)
        # The optimizer checks its own options; asked here of one weight, before a large model is read from disk.
        import torch

        from es_finetune.optim.evolution_strategy import EvolutionStrategy

        EvolutionStrategy([("probe", torch.nn.Parameter(torch.zeros(1)))], **optimizer_options(self))
        if self.resume and self.overwrite:
            raise UserError("resume continues the run in the output folder and overwrite replaces it: give one of them")


RESUMABLE = frozenset(option.name for option in dataclasses.fields(TrainConfig) if option.metadata["resumable"])


@dataclass
class EvalConfig(Setup):
    """The accuracy of a model on a task's held-out questions, by the protocol of the paper."""

    run: str | None = _flag("folder of a run: its model, task and settings, the tuned weights made again from its log")
    generation: int | None = _flag(
        "with --run: the weights after this many updates; 0: the base model; the last if not given"
    )
    split: str = _flag("test or train", "test")
    items: int = _flag("how many questions; 0: all", 0)
    samples: int | None = _flag(
        "answers to each question; 1: greedy, more: sampled at temperature 1; the task's own if not given"
    )
    kl: bool = _flag("also the KL divergence to the base model: the run's, or --kl_model", False)
    kl_model: str | None = _flag("the base model of --kl")
    seed: int = _flag("of the sampling", 0)
    output: str | None = _flag(
        "folder for answers.jsonl and result.json; runs/eval-TASK-MODEL, or RUN/eval-GENERATION, if not given"
    )

    def __post_init__(self):
        if self.run is None and self.generation is not None:
            raise UserError("generation goes with --run: it is counted in that run's log")
        if self.run is None and self.kl and self.kl_model is None:
            raise UserError("--kl needs a model to compare with: give --kl_model, or --run")
        self.fill()
        seed64("seed", self.seed)
        at_least(self, items=0)
        one_of(self, split=("test", "train"))
        if self.samples is not None:
            at_least(self, samples=1)


@dataclass
class CalibrateConfig(Setup):
    """Find a sigma for a model and a task from a few members."""

    sigmas: list[float] = _list("sigmas to try; 0.0001, 0.0002, 0.0004, ... 0.0256 if not given")
    members: int = _flag("members per sigma, in pairs of opposite noise; the same noise for every sigma", 8)
    prompts: int | None = _flag("training prompts, the same for all members; 0: all; 64, or all if fewer, if not given")
    seed: int = _flag("of noise and prompts", 0)

    def __post_init__(self):
        asked = self.prompts  # has a meaning of its own here, not the one of a run
        self.fill()
        self.prompts = asked
        seed64("seed", self.seed)
        at_least(self, members=4)
        at_most(self, members=COUNT)
        if self.members % 2:
            raise UserError(f"members come in pairs of opposite noise: their number must be even, not {self.members}")
        if self.prompts is not None:
            at_least(self, prompts=0)
        tried = [f32_positive("each of sigmas", sigma) for sigma in self.sigmas]
        self.sigmas = sorted(set(tried or [1e-4 * 2**k for k in range(9)]))  # the paper's is 0.001


@dataclass
class ReplayConfig:
    """Make the tuned weights again from base model and log, and prove it by fingerprint."""

    run: str = field(metadata={"help": "folder of the run"})
    model: str | None = _flag("where the base model is now; as in the log if not given")
    generation: int | None = _flag("stop after this many updates; all if not given")
    device: str = _flag("cpu, cuda, cuda:1, ...; auto: cuda if there is one", "auto")

    def __post_init__(self):
        make_plain(self)
        if self.generation is not None:
            at_least(self, generation=0)


@dataclass
class ExportConfig(ReplayConfig):
    """Write the tuned model, made again from base model and log, as transformers and vLLM load it."""

    output: str | None = _flag("folder to write; RUN/model if not given")
    merge_lora: bool = _flag("write the whole model with the adapter added in, instead of the adapter", False)
    overwrite: bool = _flag("replace the output folder", False)


@dataclass
class ReportConfig:
    """Write report.html, one page with the plots and sample answers of a run."""

    run: str = field(metadata={"help": "folder of the run"})


def make_plain(config) -> None:
    """Make each field the plain value of its type, as log and config.json hold it: of a Path its text, of an integer of
    NumPy an int. ValueError, by name, for a value of another type, and for NaN and infinities."""
    for name, allowed in _types(type(config)).items():
        value = getattr(config, name)
        if value is None and types.NoneType in allowed:
            continue
        if list not in allowed:
            setattr(config, name, _PLAIN[allowed[0]](name, value))
        elif isinstance(value, (list, tuple)):
            setattr(config, name, [_PLAIN[allowed[1]](f"each of {name}", entry) for entry in value])
        else:
            raise UserError(f"{name} must be a list, not {value!r}")


@functools.cache
def _types(kind: type) -> dict[str, tuple[type, ...]]:
    """Of each field (T,) or (T, NoneType), of a list (list, T)."""

    def allowed(hint: Any) -> tuple[type, ...]:
        inside = typing.get_args(hint)
        return (list, *inside) if typing.get_origin(hint) is list else inside or (hint,)

    return {name: allowed(hint) for name, hint in typing.get_type_hints(kind).items()}


def _text(name: str, value: Any) -> str:
    found = os.fspath(value) if isinstance(value, (str, os.PathLike)) else value
    if not isinstance(found, str):
        raise UserError(f"{name} must be text, not {value!r}")
    return str(found)


def _truth(name: str, value: Any) -> bool:
    if not is_bool(value):
        raise UserError(f"{name} must be true or false, not {value!r}")
    return bool(value)


_PLAIN = {str: _text, bool: _truth, int: whole, float: finite}


def at_least(config, **least: float) -> None:
    """ValueError unless each named field is at least the value given for it."""
    for name, value in least.items():
        if getattr(config, name) < value:
            raise UserError(f"{name} must be at least {value}, not {getattr(config, name)}")


def at_most(config, **most: float) -> None:
    """ValueError unless each named field is at most the value given for it."""
    for name, value in most.items():
        if getattr(config, name) > value:
            raise UserError(f"{name} must be at most {value}, not {getattr(config, name)}")


def one_of(config, **choices) -> None:
    """ValueError unless each named field is one of its choices."""
    for name, values in choices.items():
        if getattr(config, name) not in values:
            raise UserError(f"{name} must be {', '.join(values[:-1])} or {values[-1]}, not {getattr(config, name)!r}")


def recorded_options(config: TrainConfig) -> dict[str, Any]:
    """What the config asks for, wherever it runs: as log and config.json hold it."""
    return {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in ("output", "overwrite", "resume")
    }


def model_options(config: ModelConfig) -> dict[str, Any]:
    """The keyword arguments of load_model that a config holds."""
    return {name: getattr(config, name) for name in ("dtype", "lora_rank", "pad_token", "attn_implementation")}


def optimizer_options(config: TrainConfig) -> dict[str, Any]:
    """The keyword arguments of EvolutionStrategy that a config holds."""
    names = "sigma lr weight_decay anchored population seed antithetic shaping momentum momentum_window perturb_rounding update_rounding".split()
    return {"base": None if config.base == "none" else config.base, **{name: getattr(config, name) for name in names}}


def own_sigmas(config: TrainConfig) -> list[tuple[str, float]]:
    """(name pattern, sigma) of each entry of sigma_for. ValueError for one that is not PATTERN=SIGMA."""
    found = []
    for text in config.sigma_for:
        pattern, _, sigma = text.rpartition("=")
        try:
            found.append((pattern, f32_positive("sigma", float(sigma))))
        except ValueError:
            pattern = ""
        if not pattern:
            raise UserError(
                f"sigma_for must be PATTERN=SIGMA with a positive sigma, not {text!r}; to leave parameters out use "
                "freeze"
            )
    return found
