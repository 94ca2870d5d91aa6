"""A replica: one copy of the model with the run's weights over it, in this process or in an engine's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import es_kernels
from es_finetune.config import TrainConfig, model_options
from es_finetune.engines import Engine
from es_finetune.errors import UserError
from es_finetune.models.checkpoint_names import base_of, named_segments, refuse_untunable
from es_finetune.models.dtypes import dtype_of
from es_finetune.models.load import load_model, pick_device
from es_finetune.models.save import save_model
from es_finetune.models.towers import freeze_towers
from es_finetune.runs.setup import make_engine
from es_finetune.tasks import Task
from es_finetune.workers.weights import Weights


class Replica(NamedTuple):
    """One copy of a model with the run's weights over it, wherever an engine keeps it."""

    weights: Any  # weights.Weights, or what passes its calls on
    engine: Engine
    identity: dict[str, Any]  # what the log's header says of the model
    parameters: int
    backend: str  # of es_kernels
    save_model: Callable[[Path], None]  # writes the live weights, as transformers loads them
    model: Any = None  # where it is in this process
    close: Callable[[], None] = lambda: None


def make_replica(config: TrainConfig, task: Task, model, tokenizer) -> Replica:
    if (model is None) != (tokenizer is None):
        raise UserError("give model and tokenizer together, or neither to load the config's")
    if config.engine == "vllm":
        from es_finetune.workers.vllm.engine import load

        if model is not None:
            raise UserError("engine vllm loads the model by itself: name it in the config")
        return load(config, task)
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
    engine = make_engine(config, task, model, tokenizer)
    weights = Weights(list(named_segments(model)), config)
    parameters = sum(p.numel() for p in model.parameters())
    backend = es_kernels.active_backend(base_of(model).device)
    return Replica(
        weights, engine, identity, parameters, backend, lambda folder: save_model(model, tokenizer, folder), model
    )
