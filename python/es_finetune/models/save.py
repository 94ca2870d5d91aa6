"""A model and its tokenizer, written to a folder that `from_pretrained` reads.

The folder is made beside its place and then moved there: at no time is half a model under its name. (runs.files does
the same for single files; this is below it and needs whole folders.)
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from es_finetune.models.adapters import merged_copy
from es_finetune.models.checkpoint_names import is_peft, unwrap
from es_finetune.models.dtypes import MIXED, dtype_of
from es_finetune.models.towers import towers_of

# Options of a GenerationConfig that mean something only with do_sample.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def save_model(model: torch.nn.Module, tokenizer: Any, folder: str | os.PathLike, *, merge_lora: bool = False) -> None:
    """Write what `from_pretrained` reads: safetensors, configs, tokenizer.

    `folder` is whole or, as before the call, what it was; an older one of the name is replaced. Of a model that also
    sees or hears all parts are written, and the settings of its processor if it came from a folder or the hub. A model
    of several dtypes is written as it is and load_model reads it so, while transformers rounds all of it to the dtype
    of its first weight.

    Args:
        model: Of a model with a PEFT adapter the adapter is written.
        tokenizer: Its tokenizer.
        folder: Made with its parents.
        merge_lora: Write the full model with the adapter added into its weights instead. It is made on the CPU, and
            `model` stays as it is.

    Raises:
        UserError: The merged model would compute otherwise than the adapter over its base, compared in float32.
        OSError: It cannot be written.
    """
    from safetensors import SafetensorError

    inside, folder = unwrap(model), Path(folder)
    if is_peft(inside) and merge_lora:
        inside = merged_copy(inside)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    part = scratch / "new"
    part.mkdir()
    try:
        if is_peft(inside):
            # "auto" would ask the hub whether the vocabulary has grown.
            inside.save_pretrained(part, save_embedding_layers=False)
        else:
            with _savable_generation_config(inside, part):
                inside.save_pretrained(part)
            if dtype_of(inside) == "mixed":
                config = part / "config.json"
                config.write_text(json.dumps({**json.loads(config.read_text()), MIXED: True}, indent=2) + "\n")
            if towers_of(inside.config):
                _copy_processor(inside, part)
        tokenizer.save_pretrained(part)
    except BaseException as error:
        shutil.rmtree(scratch)
        if isinstance(error, (OSError, SafetensorError)):  # the second where the disk is full
            raise OSError(f"the model could not be written to {folder}: {error}") from error
        raise
    if folder.exists():  # a folder cannot be replaced in one step
        os.replace(folder, scratch / "old")
    os.replace(part, folder)
    shutil.rmtree(scratch)


def _copy_processor(model: Any, folder: Path) -> None:
    from transformers.utils import cached_file

    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        with contextlib.suppress(OSError):  # a model made in memory has no folder
            if path := cached_file(
                model.name_or_path, name, local_files_only=True, _raise_exceptions_for_missing_entries=False
            ):
                shutil.copy(path, folder / name)


@contextlib.contextmanager
def _savable_generation_config(model: Any, folder: Path) -> Iterator[None]:
    """Within, the model's generation config is one that can be saved: transformers refuses options of sampling without
    do_sample, which published models have. They are left out of what is written; greedy text does not depend on
    them."""
    config = model.generation_config
    try:
        config.save_pretrained(folder)
    except ValueError:
        model.generation_config = copy.deepcopy(config)
        for option in _SAMPLING:
            setattr(model.generation_config, option, None)
    try:
        yield
    finally:
        model.generation_config = config
