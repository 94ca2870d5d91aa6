"""Models with weights of several dtypes, which transformers would load and save as one."""

from __future__ import annotations

import functools
import itertools

import torch

from es_finetune.models.checkpoint_names import adapter_names, base_of, named_segments, unwrap
from es_kernels import NamedTensor

MIXED = "mixed_dtypes"  # key of a config.json: the files hold tensors of several dtypes, each to be loaded as it is


def dtype_of(model: torch.nn.Module) -> str:
    """Of the parameters and buffers that a checkpoint holds; "mixed" where these are several. An adapter, which has a
    file of its own, aside."""
    adapter = adapter_names(unwrap(model))
    dtypes = {
        t.dtype
        for t in base_of(model).state_dict(keep_vars=True).values()
        if t.is_floating_point() and id(t) not in adapter
    }
    return "mixed" if len(dtypes) > 1 else str(*dtypes).removeprefix("torch.")


def dtypes_in_files(path: str) -> dict[str, torch.dtype | None]:
    """Of each tensor in the safetensors files of a folder or a model of the hub; None for one of no float dtype."""
    from safetensors import safe_open
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
    from transformers.utils.hub import get_checkpoint_shard_files

    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    files = get_checkpoint_shard_files(path, index)[0] if index else [cached_file(path, SAFE_WEIGHTS_NAME)]
    names = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    dtypes: dict[str, torch.dtype | None] = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            dtypes |= {name: names.get(tensors.get_slice(name).get_dtype()) for name in tensors.keys()}
    return dtypes


def cast_as_in_files(model: torch.nn.Module, dtypes: dict[str, torch.dtype | None]) -> None:
    """Give each parameter and buffer the dtype of the file's tensor, or of the tensors that it is made of the
    widest."""
    buffers = itertools.starmap(NamedTensor, model.named_buffers())
    for name, tensor, segments in itertools.chain(named_segments(model), buffers):
        names = {segment.name for segment in segments} if segments else {name}
        stored = [dtype for key in names if (dtype := dtypes.get(key))]
        if stored and tensor.is_floating_point():
            tensor.data = tensor.data.to(functools.reduce(torch.promote_types, stored))
