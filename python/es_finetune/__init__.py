"""Fine-tune language models by evolution strategies, with forward passes only."""

from typing import TYPE_CHECKING

from es_finetune.config import TrainConfig
from es_finetune.optimizer import EvolutionStrategy, Update

if TYPE_CHECKING:
    from es_finetune.trainer import Trainer

__all__ = ["EvolutionStrategy", "TrainConfig", "Trainer", "Update"]


def __getattr__(name: str):
    # The trainer needs the packages of the extra es-kernels[finetune]; the optimizer alone needs torch.
    if name == "Trainer":
        try:
            from es_finetune.trainer import Trainer
        except ModuleNotFoundError as error:
            raise ImportError(f"{error}: pip install 'es-kernels[finetune]'", name=error.name) from error
        return Trainer
    raise AttributeError(f"module 'es_finetune' has no attribute {name!r}")
