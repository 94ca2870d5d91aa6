"""Fine-tune language models by evolution strategies, with forward passes only."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from es_finetune.config import TrainConfig
    from es_finetune.optim.evolution_strategy import EvolutionStrategy, Update
    from es_finetune.trainer import Trainer

__all__ = ["EvolutionStrategy", "TrainConfig", "Trainer", "Update"]

_HOMES = {
    "EvolutionStrategy": "optim.evolution_strategy",
    "TrainConfig": "config",
    "Trainer": "trainer",
    "Update": "optim.evolution_strategy",
}


def __getattr__(name: str):
    # On demand: torch takes two seconds, in which Ctrl-C shall find the command line ready for it. The trainer needs
    # the packages of the extra es-kernels[finetune]; the optimizer alone needs torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'es_finetune' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"es_finetune.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if name != "Trainer":
            raise
        raise ImportError(f"{error}: pip install 'es-kernels[finetune]'", name=error.name) from error
