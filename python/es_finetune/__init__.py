"""Fine-tune language models by evolution strategies, with forward passes only."""

from es_finetune.optimizer import EvolutionStrategy, Update

__all__ = ["EvolutionStrategy", "Update"]
