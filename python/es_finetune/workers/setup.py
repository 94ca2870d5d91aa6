"""Where a config is read: it becomes the workers of a run, in this process, under torchrun or in a Ray cluster."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import es_kernels
from es_finetune.config import TrainConfig, decided_options, model_options
from es_finetune.errors import UserError, require
from es_finetune.models.checkpoint_names import base_of, named_segments, refuse_untunable
from es_finetune.models.dtypes import dtype_of
from es_finetune.models.gguf import gguf_of
from es_finetune.models.load import load_model, pick_device
from es_finetune.models.save import save_model
from es_finetune.models.towers import freeze_towers
from es_finetune.runs.setup import (
    check_task,
    make_engine,
    make_members,
    make_optimizer,
    make_schedules,
    make_task,
    tell_what_is_left_out,
)
from es_finetune.tasks import Task, reads
from es_finetune.workers import torchrun
from es_finetune.workers.plan import Plan
from es_finetune.workers.protocol import Workers, require_shared_master
from es_finetune.workers.replica import Replica
from es_finetune.workers.weights import Weights
from es_finetune.workers.worker import Worker

if TYPE_CHECKING:
    from es_finetune.workers.ray_pool import RayPool


def make_workers(
    config: TrainConfig, *, model: torch.nn.Module | None = None, tokenizer: Any = None, task: Task | None = None
) -> Workers:
    """The workers that a config asks for: one, a pool, or under torchrun this rank's among the others.

    Args:
        config: Its `prompts` are settled, where they were left open. Its model and task are loaded, unless given:
        model: A causal LM, tuned in place.
        tokenizer: Its tokenizer.
        task: Any object with the attributes of `tasks.Task`.

    Raises:
        UserError: Model, task or cluster cannot be had, or do not go together.
    """
    if config.workers == "ray":
        if torchrun.under_torchrun():
            raise UserError("torchrun and workers 'ray' are two ways to the same end: use one of them")
        if any(supplied is not None for supplied in (model, tokenizer, task)):
            raise UserError("with workers 'ray' every worker loads model and task by itself: name them in the config")
        return make_pool(config)
    if torchrun.under_torchrun():
        return make_ranks(config, model=model, tokenizer=tokenizer, task=task)
    return make_worker(config, model=model, tokenizer=tokenizer, task=task)


def make_ranks(config: TrainConfig, **objects: Any) -> torchrun.Ranks:
    """The ranks of torchrun, seen from this one. `config`: as `torchrun.for_this_rank` gives it; `objects`: as for
    `make_workers`."""
    return torchrun.Ranks(make_worker(config, **objects), decided_options(config))


def make_pool(config: TrainConfig) -> RayPool:
    """A pool of Ray actors, each of which makes its own worker of the config."""
    require_shared_master(config.master)
    require("workers 'ray'", "ray", "ray")
    from es_finetune.workers.ray_pool import PoolOptions, RayPool

    plan = make_plan(config, check_task(make_task(config), config))
    options = PoolOptions(
        workers=config.ray_workers,
        gpus=0 if config.device == "cpu" else config.tensor_parallel,
        straggler_limit=config.straggler_limit or None,
        drop_stragglers=config.on_straggler == "drop",
    )
    return RayPool(plan, functools.partial(make_worker, _for_an_actor(config)), options)


def make_worker(
    config: TrainConfig, *, model: torch.nn.Module | None = None, tokenizer: Any = None, task: Task | None = None
) -> Worker:
    """One worker in this process. Arguments and errors as for `make_workers`."""
    plan = make_plan(config, check_task(task or make_task(config), config))
    return Worker(make_replica(config, plan, model, tokenizer), plan)


def make_plan(config: TrainConfig, task: Task) -> Plan:
    """What a generation of this config asks of every worker. The task: as `check_task` has proven it."""
    assert config.prompts is not None
    asked = (config.prompts or len(task.train)) * config.samples
    if reads(task):
        asked *= max(len(task.answers(item)) for item in task.train)
    return Plan(
        task,
        population=config.population,
        prompts=config.prompts,
        eval_items=config.eval_items,
        seed=config.seed,
        shaping=config.shaping,
        antithetic=config.antithetic,
        stop_on_reward_error=config.on_reward_error == "stop",
        every_member=config.master == "none" and config.members_at_once == 1,
        at_once=min(config.population, config.members_at_once or max(1, config.batch_size // asked)),
        temperature=config.temperature,
        samples=config.samples,
        objective=config.objective,
    )


def make_replica(config: TrainConfig, plan: Plan, model: torch.nn.Module | None, tokenizer: Any) -> Replica:
    """The config's model, or the one that is given, with the run's weights over it."""
    if isinstance(model, (str, Path)):
        raise UserError(
            f"model must be a loaded one, not {str(model)!r}: name it in the config, as TrainConfig(model=...)"
        )
    if (model is None) != (tokenizer is None):
        raise UserError("give model and tokenizer together, or neither to load the config's")
    if config.engine == "vllm":
        from es_finetune.workers.vllm.engine import load

        if model is not None:
            raise UserError("engine vllm loads the model by itself: name it in the config")
        return load(config, plan)
    if model is None:
        model, tokenizer, identity = load_model(
            config.model, device=pick_device(config.device), **model_options(config)
        )
    else:
        refuse_untunable(model)
        freeze_towers(model)
        identity = {
            "model": config.model,
            "class": type(base_of(model)).__name__,
            "dtype": dtype_of(model),
            "in_memory": True,
        }
    entries = list(named_segments(model))
    members = make_members(model, entries, config)
    engine = make_engine(config, plan.task, model, tokenizer, members=members)
    weights = Weights(
        entries,
        make_optimizer(entries, config, None if members is None else members.names),
        make_schedules(config),
        with_health=bool(config.health_every),
        in_place=members is None,
    )
    tell_what_is_left_out(entries, members, config)
    return Replica(
        weights,
        engine,
        identity,
        sum(p.numel() for p in model.parameters()),
        es_kernels.active_backend(base_of(model).device),
        lambda folder: save_model(model, tokenizer, folder),
        model,
        together=members is not None,
    )


def _for_an_actor(config: TrainConfig) -> TrainConfig:
    """The config for a worker of its own that may run in another folder: with absolute paths."""
    changes: dict[str, Any] = {"output": str(Path(config.output).resolve())}
    for name in ("model", "data", "test_data"):
        value = getattr(config, name)
        if value and Path(value).exists():
            changes[name] = str(Path(value).resolve())
    if (gguf := gguf_of(config.model)) is not None:
        changes["model"] = gguf.path or config.model
    if config.reward and Path(config.reward.rpartition(":")[0]).is_file():
        file, _, function = config.reward.rpartition(":")
        changes["reward"] = f"{Path(file).resolve()}:{function}"
    return dataclasses.replace(config, **changes, resume=False, overwrite=False, workers="alone")
