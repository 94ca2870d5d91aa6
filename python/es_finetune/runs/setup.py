"""What training, evaluating and calibrating begin with: threads, the task, the engine of a config."""

from __future__ import annotations

import torch

from es_finetune.config import Setup
from es_finetune.engines.hf import HFEngine
from es_finetune.tasks import Task, load_task


def make_task(config: Setup) -> Task:
    """Sets the number of threads and loads the config's task. ValueError for a task that cannot be had."""
    if config.threads:
        torch.set_num_threads(config.threads)
    return load_task(
        config.task, data=config.data, test_data=config.test_data, reward=config.reward, time_limit=config.time_limit
    )


def make_engine(config: Setup, task: Task, model, tokenizer, **sampling) -> HFEngine:
    """The engine over a loaded model, proven to generate; `sampling`: HFEngine's temperature and seed, greedy if left
    out."""
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
