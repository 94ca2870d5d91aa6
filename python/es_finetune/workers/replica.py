"""A replica: one copy of the model with the run's weights over it, in this process or in an engine's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from es_finetune.engines import Engine


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
