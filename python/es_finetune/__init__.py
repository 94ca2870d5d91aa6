"""Fine-tune language models by evolution strategies, with forward passes only.

Trainer, TrainConfig         a run: made from a config, kept in a folder, resumed after a kill
Callback                     what follows a run, and may stop it
EvolutionStrategy, Update    the optimizer alone, for any training loop
evaluate                     accuracy of a model, or of a run's base or tuned weights
calibrate                    a sigma for a model and a task
replay, export, report       of a run: its weights again, its model in a folder, its page
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from es_finetune.commands.calibrate import calibrate
    from es_finetune.commands.evaluate import evaluate
    from es_finetune.commands.export import export
    from es_finetune.commands.replay import replay
    from es_finetune.commands.report import report
    from es_finetune.config import TrainConfig
    from es_finetune.monitor.callbacks import Callback
    from es_finetune.optim.evolution_strategy import EvolutionStrategy
    from es_finetune.optim.update import Update
    from es_finetune.trainer import Trainer

__all__ = [
    "Callback",
    "EvolutionStrategy",
    "TrainConfig",
    "Trainer",
    "Update",
    "calibrate",
    "evaluate",
    "export",
    "replay",
    "report",
]

_HOMES = {
    "Callback": "monitor.callbacks",
    "EvolutionStrategy": "optim.evolution_strategy",
    "TrainConfig": "config",
    "Trainer": "trainer",
    "Update": "optim.update",
    "calibrate": "commands.calibrate",
    "evaluate": "commands.evaluate",
    "export": "commands.export",
    "replay": "commands.replay",
    "report": "commands.report",
}
_TORCH_ONLY = ("EvolutionStrategy", "TrainConfig", "Update")  # need torch alone, no package of es-kernels[finetune]


def __getattr__(name: str) -> Any:
    # On demand: torch takes two seconds, in which the command line must be ready for Ctrl-C.
    if name not in _HOMES:
        raise AttributeError(f"module 'es_finetune' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"es_finetune.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if name in _TORCH_ONLY:
            raise
        raise ImportError(f"{error}: pip install 'es-kernels[finetune]'", name=error.name) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
