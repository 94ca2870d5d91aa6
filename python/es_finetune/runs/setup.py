"""Where a config is read: it becomes the task, the engine and the optimizer that the rest of a run works with."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch

from es_finetune.config import CUSTOM_PROMPTS, Setup, TrainConfig, optimizer_options, own_sigmas
from es_finetune.engines.hf import HFEngine
from es_finetune.errors import UserError
from es_finetune.models.checkpoint_names import base_of
from es_finetune.models.members import Members
from es_finetune.optim.evolution_strategy import EvolutionStrategy
from es_finetune.runs.groups import param_groups
from es_finetune.runs.schedules import Schedules
from es_finetune.tasks import Data, Reward, Task, load_task, reads
from es_kernels import NamedTensor

logger = logging.getLogger(__name__)


def make_task(config: Setup) -> Task:
    """The config's task. UserError for one that cannot be had."""
    return load_task(
        config.task,
        data=config.data,
        test_data=config.test_data,
        reward=config.reward,
        time_limit=config.time_limit,
        logprob_per_token=config.logprob_per_token,
    )


def given_task(config: Setup, task: Task | None = None, **supplied: Data | Reward | None) -> Task | None:
    """The task that was given as an object, or is made of data and reward; None for the one that the config names.

    Args:
        config: Of data and reward a path or a name is put into it, as if it had come with it: so the log keeps it.
        task: The object.
        **supplied: `data`, `test_data` and `reward`, None where they are not given.

    Raises:
        UserError: One is given twice, does not go with the task, or is none.
    """
    if isinstance(task, str):
        raise UserError(f"task must be an object, not {task!r}: name it in the config, TrainConfig(task={task!r})")
    supplied = {name: value for name, value in supplied.items() if value is not None}
    for name, value in supplied.items():
        if task is not None:
            raise UserError(f"{name} was given beside task, which has questions and a reward of its own: leave one out")
        if getattr(config, name) is not None:
            raise UserError(f"{name} was given to the Trainer and in the config: leave one out")
        if isinstance(value, (str, Path)):
            setattr(config, name, str(value))
        elif config.task != "custom":
            raise UserError(
                f"{name} is for the task 'custom', and the config's task is {config.task!r}: leave {name} out, or make "
                "the config with task='custom'"
            )
    if all(isinstance(value, (str, Path)) for value in supplied.values()):
        return task
    made_of: dict[str, Any] = {"data": config.data, "test_data": config.test_data, "reward": config.reward} | supplied
    return load_task("custom", **made_of, time_limit=config.time_limit, logprob_per_token=config.logprob_per_token)


def check_task(task: Task, config: TrainConfig) -> Task:
    """The task, proven to have what the config asks for. A number of prompts that the config left open is settled here.

    Raises:
        UserError: It has no questions for training or none that are held out, or fewer than `config.prompts`; or there
            is nothing to sample, for its answers are read.
    """
    if reads(task) and config.temperature:
        raise UserError("temperature is for written answers, and reward logprob reads given ones: leave it out")

    for split in ("train", "test"):
        if not getattr(task, split):
            raise UserError(f"task {config.task} has no {split} items")
    if config.prompts is None:
        config.prompts = CUSTOM_PROMPTS if len(task.train) > CUSTOM_PROMPTS else 0
    if config.prompts > len(task.train):
        raise UserError(
            f"prompts must be at most {len(task.train)}, the training prompts of {config.task}, not {config.prompts}"
        )
    return task


def make_engine(config: Setup, task: Task, model: torch.nn.Module, tokenizer: Any, **options: Any) -> HFEngine:
    """The engine over a loaded model, proven to generate, and from here on the config's number of threads.

    `options`: HFEngine's others: who shares a batch, nobody if left out.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    engine = HFEngine(
        model,
        tokenizer,
        config.max_new_tokens or task.max_new_tokens,
        config.batch_size,
        decoding=config.decoding,
        **options,
    )
    engine.prove()
    return engine


def make_members(model: torch.nn.Module, entries: Iterable[NamedTensor], config: TrainConfig) -> Members | None:
    """Where members of a run of this config add their noise in one batch; None where they are put in place one by one.

    Args:
        model: What is tuned.
        entries: Its parameters, as `checkpoint_names.named_segments` gives them.
        config: Its `members_at_once`, and its engine: vLLM's adapters can change less.

    Raises:
        UserError: There is no parameter in which members of a batch could differ.
    """
    if config.members_at_once == 1:
        return None
    tunable = [entry for entry in entries if entry.tensor.requires_grad]
    members = Members(model, tunable, adapters=config.engine == "vllm")
    if not members.names:
        kind = type(base_of(model)).__name__
        raise UserError(f"{kind} has no layer to which members of one batch can add noise: give --members_at_once 1")
    return members


def tell_what_is_left_out(entries: Iterable[NamedTensor], members: Members | None, config: TrainConfig) -> None:
    """One line on the parameters that the config would tune if members shared no batch, if there are such."""
    if members is None:
        return
    groups = param_groups(entries, config.sigma, tune=config.tune, freeze=config.freeze)
    asked = [entry for group in groups for entry in group["params"]]
    left_out = [entry for entry in asked if entry.name not in members.names]
    if left_out:
        count, all_of_them = (sum(entry.tensor.numel() for entry in part) for part in (left_out, asked))
        logger.info(
            f"members share a batch, so {len(left_out)} parameters are not tuned, {100 * count / all_of_them:.2g} % of "
            f"the weights, such as {left_out[0].name}; --members_at_once 1 tunes all"
        )


def make_optimizer(
    entries: Iterable[NamedTensor], config: TrainConfig, shared: Collection[str] | None
) -> EvolutionStrategy:
    """The optimizer of a config.

    Args:
        entries: All parameters, as `checkpoint_names.named_segments` gives them; those that require grad are tuned.
        config: Its options of the optimizer, and which parameters it tunes.
        shared: Names of the parameters in which members of a batch can differ, where they share one: others are not
            tuned.

    Raises:
        UserError: The names do not fit the config's patterns (`groups.param_groups`), or the optimizer refuses.
    """
    groups = param_groups(
        entries,
        config.sigma,
        tune=config.tune,
        freeze=config.freeze,
        sigma_for=own_sigmas(config),
        shared=shared,
    )
    return EvolutionStrategy(groups, **optimizer_options(config))


def make_schedules(config: TrainConfig) -> Schedules:
    """How sigma and lr fall in a run of this config."""
    return Schedules(
        config.lr, config.lr_schedule, config.sigma_schedule, config.final_scale, generations=config.generations
    )
