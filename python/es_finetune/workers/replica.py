"""A replica: one copy of the model with the run's weights over it, in this process or in an engine's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from es_finetune.engines import Engine


class Replica(NamedTuple):
    """One copy of a model with the run's weights over it, wherever an engine keeps it.

    Attributes:
        weights: `weights.Weights`, or what passes its calls on.
        engine: Answers with the live weights.
        identity: What the log's header says of the model.
        parameters: How many it has.
        backend: Of es_kernels.
        save_model: Writes the live weights into a folder, as transformers loads them.
        model: The torch module, where it is in this process.
        close: Lets go of the engine.
        together: Whether members share a batch; the engine is then a MembersEngine.
    """

    weights: Any
    engine: Engine
    identity: dict[str, Any]
    parameters: int
    backend: str
    save_model: Callable[[Path], None]
    model: Any = None
    close: Callable[[], None] = lambda: None
    together: bool = False
