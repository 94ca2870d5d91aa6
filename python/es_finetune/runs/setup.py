"""Where a config is read: it becomes the task, the engine and the optimizer that the rest of a run works with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from es_finetune.config import CUSTOM_PROMPTS, Setup, TrainConfig, optimizer_options, own_sigmas
from es_finetune.engines.hf import HFEngine
from es_finetune.errors import UserError
from es_finetune.optim.evolution_strategy import EvolutionStrategy
from es_finetune.runs.groups import param_groups
from es_finetune.runs.schedules import Schedules
from es_finetune.tasks import Task, load_task
from es_kernels import NamedTensor


def make_task(config: Setup) -> Task:
    """The config's task. UserError for one that cannot be had."""
    return load_task(
        config.task, data=config.data, test_data=config.test_data, reward=config.reward, time_limit=config.time_limit
    )


def check_task(task: Task, config: TrainConfig) -> Task:
    """The task, proven to have what the config asks for. A number of prompts that the config left open is settled here.

    Raises:
        UserError: It has no questions for training or none that are held out, or fewer than `config.prompts`.
    """
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


def make_engine(config: Setup, task: Task, model: torch.nn.Module, tokenizer: Any, **sampling: Any) -> HFEngine:
    """The engine over a loaded model, proven to generate, and from here on the config's number of threads.

    `sampling`: HFEngine's temperature and seed, greedy if left out.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    engine = HFEngine(
        model,
        tokenizer,
        config.max_new_tokens or task.max_new_tokens,
        config.batch_size,
        decoding=config.decoding,
        **sampling,
    )
    engine.prove()
    return engine


def make_optimizer(entries: Iterable[NamedTensor], config: TrainConfig) -> EvolutionStrategy:
    """The optimizer of a config.

    Args:
        entries: All parameters, as `checkpoint_names.named_segments` gives them; those that require grad are tuned.
        config: Its options of the optimizer, and which parameters it tunes.

    Raises:
        UserError: The names do not fit the config's patterns (`groups.param_groups`), or the optimizer refuses.
    """
    groups = param_groups(entries, config.sigma, tune=config.tune, freeze=config.freeze, sigma_for=own_sigmas(config))
    return EvolutionStrategy(groups, **optimizer_options(config))


def make_schedules(config: TrainConfig) -> Schedules:
    """How sigma and lr fall in a run of this config."""
    return Schedules(
        config.lr, config.lr_schedule, config.sigma_schedule, config.final_scale, generations=config.generations
    )
