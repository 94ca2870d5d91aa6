"""The names that decide the noise: those of the checkpoint, whatever wraps the model in memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch


def named_segments(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(canonical name, parameter) of each parameter of `model`, tied ones once, under their first name.

    The canonical name is the one that `save_pretrained` writes: without what DataParallel ("module.") and torch.compile
    ("_orig_mod.") put in. A parameter that a checkpoint holds as several tensors, as the fused experts of a mixture, keeps
    its in-memory name, with a warning: its noise is not that of the checkpoint's tensors.
    """
    fused = []
    for name, parameter in model.named_parameters():
        while name.startswith("module."):
            name = name.removeprefix("module.")
        name = ".".join(part for part in name.split(".") if part != "_orig_mod")
        if parameter.ndim == 3 and ".experts." in name:
            fused.append(name)
        yield name, parameter
    if fused:
        warnings.warn(f"{len(fused)} fused expert tensor(s) draw their noise by in-memory name, e.g. {fused[0]}", stacklevel=2)
