"""What a user can ask for: the dataclasses behind the commands' flags, YAML files and the Python API."""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from es_finetune.engines import DECODINGS
from es_finetune.errors import UserError, did_you_mean
from es_finetune.models import WEIGHT_DTYPES
from es_finetune.optim.options import (
    COUNT,
    ROUNDINGS,
    SHAPINGS,
    check_group,
    check_options,
    f32_positive,
    finite,
    is_bool,
    noise_rank_of,
    seed64,
    whole,
)
from es_finetune.tasks import NAMES

# What a flag left out means: the paper's run, or for the embedded model the demo. There sigma 0.01 costs a member 4 of
# 87 points of exact plain answers and 0.02 costs 14; threads=1 because a model this small gains nothing from a second
# one, and with two a busy neighbour on either core makes every small matrix product wait (10 times slower in a trial).
PAPER = {"sigma": 1e-3, "lr": 5e-4, "generations": 500, "prompts": 0, "eval_every": 25, "batch_size": 100, "threads": 0}
DEMO = {"sigma": 0.01, "lr": 0.01, "generations": 30, "prompts": 128, "eval_every": 5, "batch_size": 128, "threads": 1}

MAX_THREADS = 1024  # torch still runs with 4096 of them on 2 cores; with 100,000 the process crashes
# Of a custom task that has more: 30 members give 3,840 answers a generation, however long the file is
CUSTOM_PROMPTS = 128

NOISE_RANK = "rank of the noise of each matrix, 1 to 64; 0: full noise"
SCHEDULES = ("constant", "linear", "cosine")
OBJECTIVES = ("mean", "best")
TRACKERS = ("tensorboard", "wandb", "trackio", "none")


# Of the flags, in the order of a command's help
GROUPS = ("task", "model", "run", "noise and update", "evaluation", "workers", "files")


# A field whose default is None may be None when it is given. Where its type says otherwise, the config fills it in.
#
# In a field's metadata: its group and help, the choices it has, if it has few, and whether it is resumable. A resumable
# option may differ when a run goes on: it decides where, how fast and how closely watched the run is, not what its log
# holds, since equal scores give equal weights anywhere. Model, data and reward are resumable because the log knows them
# by fingerprint and digest.
def _flag(
    group: str, help: str, default: Any = None, *, choices: Sequence[str] | None = None, resumable: bool = False
) -> Any:
    return field(default=default, metadata=_metadata(group, help, choices, resumable))


def _list(group: str, help: str, *default: str, choices: Sequence[str] | None = None, resumable: bool = False) -> Any:
    return field(default_factory=lambda: list(default), metadata=_metadata(group, help, choices, resumable))


def _preset(group: str, name: str, help: str, *, resumable: bool = False) -> Any:
    return _flag(group, f"{help}; {DEMO[name]} with the embedded model, else {PAPER[name]}", resumable=resumable)


def _folder_of_run() -> Any:
    return field(metadata=_metadata("run", "folder of the run", None, False))


def _metadata(group: str, help: str, choices: Sequence[str] | None, resumable: bool) -> dict[str, Any]:
    return {"group": group, "help": help, "choices": choices, "resumable": resumable}


@dataclass(kw_only=True)
class TaskConfig:
    """What is asked and how answers are scored."""

    task: str = _flag(
        "task",
        "countdown, conciseness, short-answers, math, reasoning-gym:NAME, countdown-char, or custom: your --data and "
        "--reward",
    )
    data: str | None = _flag(
        "task",
        "training items: a .jsonl file with one object a line that has a prompt (custom), or a dataset's name or "
        "folder (math)",
        resumable=True,
    )
    test_data: str | None = _flag(
        "task",
        "held-out items, in the form of --data; left out: a share of --data (custom), MATH-500 (math)",
        resumable=True,
    )
    reward: str | None = _flag(
        "task",
        "your reward, FILE.py:FUNCTION or MODULE:FUNCTION, called as reward(completion, item) in a process of its own; "
        "logprob: the log-probability of the item's answer, minus that of its rejected one, if it has one; nothing is "
        "generated in training",
        resumable=True,
    )
    logprob_per_token: bool = _flag(
        "task", "with reward logprob the mean over an answer's tokens instead of their sum", False
    )
    time_limit: float = _flag(
        "task",
        "seconds after which the scoring of one answer is stopped, where it runs in a process of its own",
        5.0,
        resumable=True,
    )
    max_new_tokens: int | None = _flag("task", "length of an answer; the task's own if not given")


@dataclass(kw_only=True)
class ModelConfig:
    """The model and where it computes."""

    model: str = _flag(
        "model",
        "folder or hub name of a causal LM or of a PEFT adapter, FILE.gguf or FOLDER:FILE.gguf; countdown-char brings "
        "its own",
        resumable=True,
    )
    dtype: str = _flag("model", "of the weights; auto: as saved", "auto", choices=WEIGHT_DTYPES)
    lora_rank: int = _flag("model", "tune a new LoRA adapter of this rank instead of the weights; 0: no adapter", 0)
    pad_token: str | None = _flag("model", "an existing token to pad with, for a tokenizer that has none")
    batch_size: int = _preset("model", "batch_size", "prompts per call of generate", resumable=True)
    decoding: str = _flag(
        "model",
        "how transformers generates; static: compiled on a GPU; continuous: continuous batching",
        "dynamic",
        choices=DECODINGS,
        resumable=True,
    )
    attn_implementation: str | None = _flag(
        "model", "transformers' attention, e.g. sdpa or flash_attention_2; its own choice if not given", resumable=True
    )
    threads: int = _preset("model", "threads", "CPU threads; 0: torch's choice", resumable=True)
    device: str = _flag("model", "cpu, cuda, cuda:1, ...; auto: cuda if there is one", "auto", resumable=True)


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
            if self.data or self.reward:
                self.task = "custom"
            elif self.model in (None, "embedded"):
                self.task = "countdown-char"
            else:
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
        if self.time_limit <= 0:
            raise UserError(f"time_limit must be a positive number of seconds, not {self.time_limit}")
        if self.max_new_tokens is not None:
            at_least(self, max_new_tokens=1)


@dataclass(kw_only=True)
class TrainConfig(Setup):
    """One run. A value of None is filled in when the config is made: the demo's where the model is the embedded one,
    else the paper's (arXiv:2509.24372)."""

    output: str = _flag("files", "folder of the run; runs/TASK-MODEL if not given", resumable=True)
    generations: int = _preset("noise and update", "generations", "how many updates")
    population: int = _flag("noise and update", "members per generation", 30)
    sigma: float = _preset("noise and update", "sigma", "scale of the noise")
    lr: float = _preset("noise and update", "lr", "scale of the update")
    sigma_schedule: str = _flag(
        "noise and update", "how sigma falls from its value to final_scale times it", "constant", choices=SCHEDULES
    )
    lr_schedule: str = _flag("noise and update", "the same for lr", "constant", choices=SCHEDULES)
    final_scale: float = _flag("noise and update", "where the schedules end", 0.1)
    shaping: str = _flag(
        "noise and update",
        "rewards to coefficients; ranks: centred ranks; per_prompt: z-scores for each prompt, averaged",
        "zscore",
        choices=SHAPINGS,
    )
    antithetic: bool = _flag("noise and update", "members in pairs of opposite noise", False)
    noise_rank: int = _flag("noise and update", NOISE_RANK, 0)
    momentum: float = _flag(
        "noise and update", "of past updates, 0 <= momentum < 1; kept as seeds and coefficients, not as a tensor", 0.0
    )
    momentum_window: int = _flag("noise and update", "generations that momentum remembers", 8)
    weight_decay: float = _flag("noise and update", "per update, times lr", 0.0)
    anchored: bool = _flag("noise and update", "decay toward the initial weights instead of zero", False)
    master: str = _flag(
        "noise and update", "where the exact weights live", "fp32", choices=("fp32", "copy", "host", "none")
    )
    perturb_rounding: str = _flag("noise and update", "of perturbed weights", "nearest", choices=ROUNDINGS)
    update_rounding: str | None = _flag(
        "noise and update",
        "of the update; stochastic with master copy and none, else nearest",
        choices=ROUNDINGS,
    )
    tune: list[str] = _list(
        "noise and update", "name patterns (as *.mlp.*) of the parameters to tune; all if not given"
    )
    freeze: list[str] = _list("noise and update", "name patterns of parameters to leave out")
    sigma_for: list[str] = _list(
        "noise and update", "PATTERN=SIGMA: another sigma for the parameters of these names; the first that fits counts"
    )
    prompts: int | None = _flag(
        "task",
        "training prompts drawn for each generation, the same for all members; 0: all of them; "
        f"{DEMO['prompts']} with the embedded model, {CUSTOM_PROMPTS} with a custom task (all, if it has fewer), else "
        f"{PAPER['prompts']}",
    )
    temperature: float = _flag(
        "task",
        "of training answers, with the same random numbers for all members; 0: greedy, as held-out answers are",
        0.0,
    )
    samples: int = _flag("task", "training answers to each prompt, with a temperature above 0", 1)
    objective: str = _flag(
        "task", "the reward of a prompt: of its samples the mean, or the best", "mean", choices=OBJECTIVES
    )
    seed: int = _flag("noise and update", "of the whole run", 0)
    eval_every: int = _preset(
        "evaluation",
        "eval_every",
        "generations between evals on the held-out prompts; 0: only first and last",
        resumable=True,
    )
    eval_items: int = _flag("evaluation", "how many held-out prompts; 0: all", 0, resumable=True)
    health_every: int = _flag(
        "evaluation",
        "generations between measurements of the realised noise and step and of the distance from the base model; 0: "
        "never",
        10,
        resumable=True,
    )
    snapshot_every: int = _flag(
        "files",
        "generations between snapshots of the exact weights, which make resuming faster; 0: none, the log is enough",
        0,
        resumable=True,
    )
    save_model: bool = _flag("files", "write the tuned model at the end", True, resumable=True)
    report_to: list[str] = _list("files", "where the curves go", "tensorboard", choices=TRACKERS, resumable=True)
    on_reward_error: str = _flag(
        "task",
        "floor: an answer whose reward fails gets the lowest reward; stop: the run ends",
        "floor",
        choices=("floor", "stop"),
        resumable=True,
    )
    members_at_once: int | None = _flag(
        "workers",
        "members that share a batch, with noise_rank 1 or more; 1: one by one, the only way with decoding continuous; "
        "0: as many as batch_size holds with all their prompts; 0 where it can be, if not given",
    )
    engine: str = _flag(
        "workers", "what generates; hf: transformers, in this process", "hf", choices=("hf", "vllm"), resumable=True
    )
    tensor_parallel: int = _flag("workers", "GPUs that hold one copy of the model, with engine vllm", 1, resumable=True)
    workers: str = _flag(
        "workers",
        "ray: a pool of actors in the Ray cluster of RAY_ADDRESS, or of this machine; torchrun needs no flag",
        "alone",
        choices=("alone", "ray"),
        resumable=True,
    )
    ray_workers: int = _flag("workers", "how many actors; 0: one for each GPU of the cluster", 0, resumable=True)
    straggler_limit: float = _flag(
        "workers",
        "seconds after which a member that is still out is given to another worker too, with workers ray; 0: wait",
        0.0,
        resumable=True,
    )
    on_straggler: str = _flag(
        "workers",
        "what becomes of such a member; drop: it is left out of its generation",
        "reissue",
        choices=("reissue", "drop"),
        resumable=True,
    )
    resume: bool = _flag(
        "files",
        "continue the run in the output folder; its config counts, and flags may only repeat it or change how it is "
        "watched",
        False,
        resumable=True,
    )
    overwrite: bool = _flag("files", "replace the run in the output folder", False, resumable=True)

    def __post_init__(self):
        self.fill()
        if self.output is None:
            self.output = str(Path("runs") / self.label)
        at_most(self, generations=COUNT)
        at_least(
            self,
            temperature=0,
            samples=1,
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
        alone = {
            "noise_rank 0": not self.noise_rank,
            "decoding continuous": self.decoding == "continuous",
        }
        if self.members_at_once is None:
            self.members_at_once = int(any(alone.values()))
        at_least(self, members_at_once=0)
        for what, only_one in alone.items():
            if only_one and self.members_at_once != 1:
                raise UserError(f"members_at_once must be 1 with {what}, not {self.members_at_once}")
        if self.samples > 1 and not self.temperature:
            raise UserError(f"{self.samples} greedy samples are all the same: give a temperature above 0, or samples 1")
        if self.objective == "best" and self.samples == 1:
            raise UserError("objective best is of several samples: give samples above 1, or leave it out")
        if self.temperature and self.decoding == "continuous":
            raise UserError(
                "with decoding continuous members would not share their random numbers: use another decoding"
            )
        if self.engine == "hf" and self.tensor_parallel > 1:
            raise UserError("tensor_parallel goes with --engine vllm")
        if not 0 < self.final_scale <= 1:
            raise UserError(f"final_scale must be in (0, 1], not {self.final_scale}")
        if not self.lr:
            raise UserError("lr must be a positive number, not 0: with it no generation would change the weights")
        own_sigmas(self)
        options = optimizer_options(self)
        check_group(**{name: options.pop(name) for name in ("sigma", "lr", "weight_decay", "noise_rank")})
        del options["anchored"]
        check_options(**options)
        if self.resume and self.overwrite:
            raise UserError("resume continues the run in the output folder and overwrite replaces it: give one of them")


RESUMABLE = frozenset(option.name for option in dataclasses.fields(TrainConfig) if option.metadata["resumable"])


@dataclass(kw_only=True)
class EvalConfig(Setup):
    """The accuracy of a model on a task's held-out questions, by the protocol of the paper."""

    run: str | None = _flag(
        "run", "folder of a run: its model, task and settings, the tuned weights made again from its log"
    )
    generation: int | None = _flag(
        "run", "with --run: the weights after this many updates; 0: the base model; the last if not given"
    )
    split: str = _flag("evaluation", "of the task's questions", "test", choices=("test", "train"))
    items: int = _flag("evaluation", "how many questions; 0: all", 0)
    samples: int | None = _flag(
        "evaluation", "answers to each question; 1: greedy, more: sampled at temperature 1; the task's own if not given"
    )
    kl: bool = _flag("evaluation", "also the KL divergence to the base model: the run's, or --kl_model", False)
    kl_model: str | None = _flag("evaluation", "the base model of --kl")
    seed: int = _flag("noise and update", "of the sampling", 0)
    output: str | None = _flag(
        "files", "folder for answers.jsonl and result.json; runs/eval-TASK-MODEL, or RUN/eval-GENERATION, if not given"
    )

    def __post_init__(self):
        if self.run is None and self.generation is not None:
            raise UserError("generation goes with --run: it is counted in that run's log")
        if self.run is None and self.kl and self.kl_model is None:
            raise UserError("--kl needs a model to compare with: give --kl_model, or --run")
        self.fill()
        seed64("seed", self.seed)
        at_least(self, items=0)
        if self.generation is not None:
            at_least(self, generation=0)
        if self.samples is not None:
            at_least(self, samples=1)


@dataclass(kw_only=True)
class CalibrateConfig(Setup):
    """Find a sigma for a model and a task from a few members."""

    sigmas: list[float] = _list("noise and update", "sigmas to try; 0.0001, 0.0002, 0.0004, ... 0.0256 if not given")
    members: int = _flag(
        "noise and update", "members per sigma, in pairs of opposite noise; the same noise for every sigma", 8
    )
    prompts: int | None = _flag(
        "task", "training prompts, the same for all members; 0: all; 64, or all if fewer, if not given"
    )
    noise_rank: int = _flag("noise and update", NOISE_RANK, 0)
    seed: int = _flag("noise and update", "of noise and prompts", 0)

    def __post_init__(self):
        asked = self.prompts  # has a meaning of its own here, not the one of a run
        self.fill()
        self.prompts = asked
        seed64("seed", self.seed)
        noise_rank_of(self.noise_rank)
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

    run: str = _folder_of_run()
    model: str | None = _flag("model", "where the base model is now; as in the log if not given")
    generation: int | None = _flag("run", "stop after this many updates; all if not given")
    device: str = _flag("model", "cpu, cuda, cuda:1, ...; auto: cuda if there is one", "auto")

    def __post_init__(self):
        make_plain(self)
        if self.generation is not None:
            at_least(self, generation=0)


@dataclass
class ExportConfig(ReplayConfig):
    """Write the tuned model, made again from base model and log, as transformers and vLLM load it."""

    output: str | None = _flag("files", "folder to write; RUN/model if not given")
    merge_lora: bool = _flag("files", "write the whole model with the adapter added in, instead of the adapter", False)
    overwrite: bool = _flag("files", "replace the output folder", False)


@dataclass
class ReportConfig:
    """Write report.html, one page with the plots and sample answers of a run."""

    run: str = _folder_of_run()


def make_plain(config) -> None:
    """Make each field the plain value of its type, as log and config.json hold it: of a Path its text, of an integer of
    NumPy an int. UserError, by name, for a value of another type, for NaN and infinities, and for one that is none of
    the field's choices."""
    for name, allowed in field_types(type(config)).items():
        value = getattr(config, name)
        if value is None and types.NoneType in allowed:
            continue
        if list not in allowed:
            setattr(config, name, _PLAIN[allowed[0]](name, value))
        elif isinstance(value, (list, tuple)):
            setattr(config, name, [_PLAIN[allowed[1]](f"each of {name}", entry) for entry in value])
        else:
            raise UserError(f"{name} must be a list, not {value!r}")
    for option in dataclasses.fields(config):
        choices, value = option.metadata["choices"], getattr(config, option.name)
        for entry in value if isinstance(value, list) else [value]:
            if choices and entry is not None and entry not in choices:
                raise UserError(f"{option.name} must be {', '.join(choices[:-1])} or {choices[-1]}, not {entry!r}")


def field_types(kind: type) -> dict[str, tuple[type, ...]]:
    """Of each field (T,), of a list (list, T), and with NoneType at the end where it may be given as None."""
    hints = typing.get_type_hints(kind)

    def allowed(option: dataclasses.Field) -> tuple[type, ...]:
        hint = hints[option.name]
        inside = typing.get_args(hint)
        if typing.get_origin(hint) is list:
            return (list, *inside)
        if types.NoneType in inside:
            return inside
        return (hint, types.NoneType) if option.default is None else (hint,)

    return {option.name: allowed(option) for option in dataclasses.fields(kind)}


def _text(name: str, value: Any) -> str:
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else value
    if not isinstance(text, str):
        raise UserError(f"{name} must be text, not {value!r}")
    return str(text)


def _truth(name: str, value: Any) -> bool:
    if not is_bool(value):
        raise UserError(f"{name} must be true or false, not {value!r}")
    return bool(value)


_PLAIN = {str: _text, bool: _truth, int: whole, float: finite}


def at_least(config, **least: float) -> None:
    """UserError unless each named field is at least the value given for it."""
    for name, value in least.items():
        if getattr(config, name) < value:
            raise UserError(f"{name} must be at least {value}, not {getattr(config, name)}")


def at_most(config, **most: float) -> None:
    """UserError unless each named field is at most the value given for it."""
    for name, value in most.items():
        if getattr(config, name) > value:
            raise UserError(f"{name} must be at most {value}, not {getattr(config, name)}")


def recorded_options(config: TrainConfig) -> dict[str, Any]:
    """What the config asks for, wherever it runs: as log and config.json hold it."""
    return {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in ("output", "overwrite", "resume")
    }


def as_flags(options: Mapping[str, Any]) -> list[str]:
    """The words of a command line that give these options. One that is None or an empty list has none."""
    words = []
    for name, value in options.items():
        if value not in (None, []):
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def decided_options(config: TrainConfig) -> dict[str, Any]:
    """Of the recorded options those that decide what the log holds: not the resumable ones."""
    return {name: value for name, value in recorded_options(config).items() if name not in RESUMABLE}


def model_options(config: ModelConfig) -> dict[str, Any]:
    """The keyword arguments of load_model that a config holds."""
    return {name: getattr(config, name) for name in ("dtype", "lora_rank", "pad_token", "attn_implementation")}


def optimizer_options(config: TrainConfig) -> dict[str, Any]:
    """The keyword arguments of EvolutionStrategy that a config holds."""
    names = (
        "sigma lr weight_decay anchored noise_rank population seed antithetic shaping momentum momentum_window "
        "perturb_rounding update_rounding"
    ).split()
    return {
        "master": None if config.master == "none" else config.master,
        **{name: getattr(config, name) for name in names},
    }


def own_sigmas(config: TrainConfig) -> list[tuple[str, float]]:
    """(name pattern, sigma) of each entry of sigma_for. UserError for one that is not PATTERN=SIGMA."""
    sigmas = []
    for text in config.sigma_for:
        pattern, _, sigma = text.rpartition("=")
        try:
            sigmas.append((pattern, f32_positive("sigma", float(sigma))))
        except ValueError:
            pattern = ""
        if not pattern:
            raise UserError(
                f"sigma_for must be PATTERN=SIGMA with a positive sigma, not {text!r}; to leave parameters out use "
                "freeze"
            )
    return sigmas
