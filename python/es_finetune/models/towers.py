"""The parts of a model that see or hear. Text does not pass through them: they are frozen, and saved as they are."""

from __future__ import annotations

import logging
from typing import Any

import torch

from es_finetune.models.checkpoint_names import base_of

logger = logging.getLogger(__name__)


def freeze_towers(model: torch.nn.Module) -> None:
    """Freeze, with a warning, what text does not pass through: the parts of a model that see or hear, and what
    joins them to the text."""
    base = base_of(model)
    kinds = tuple(map(type, towers_of(getattr(base, "config", None))))
    if not kinds:
        return
    outside = {
        id(p)
        for module in base.modules()
        if isinstance(getattr(module, "config", None), kinds)
        for p in module.parameters()
    }
    if "text_config" in base.config.sub_configs:
        text = [
            part
            for part in (base.get_decoder(), base.get_input_embeddings(), base.get_output_embeddings())
            if part is not None
        ]
        outside |= {id(p) for p in base.parameters()} - {id(p) for part in text for p in part.parameters()}
    frozen = {name: p for name, p in base.named_parameters() if p.requires_grad and id(p) in outside}
    for p in frozen.values():
        p.requires_grad_(False)
    if frozen:
        logger.warning(
            f"{len(frozen)} parameter(s) of {type(base).__name__}, e.g. {next(iter(frozen))}, take no part in text: "
            "they are frozen, and saved as they are"
        )


def towers_of(config: Any) -> list[Any]:
    """The configs of the parts of a model, by its own config, that see or hear."""
    parts = [
        getattr(config, key, None) for key in getattr(config, "sub_configs", {}) if key.startswith(("vision", "audio"))
    ]
    return [part for part in parts if part is not None]
