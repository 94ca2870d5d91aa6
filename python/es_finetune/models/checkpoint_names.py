"""The names that decide the noise: those of the checkpoint, whatever wraps, fuses or adapts the model in memory."""

from __future__ import annotations

import itertools
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from es_finetune.errors import UserError
from es_kernels import NamedTensor, Segment
from es_kernels.segment import MAX_SEGMENTS_PER_TENSOR, rows_fit

logger = logging.getLogger(__name__)

# What torch.compile and checkpoint_wrapper call the module inside
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")


def named_segments(model: torch.nn.Module) -> Iterator[NamedTensor]:
    """Each parameter of `model`, tied ones once, with its canonical name: that in the files that `save_pretrained`
    writes.

    So it is without what DataParallel, torch.compile and activation checkpointing put in; of tied parameters the one
    that is written, nearly always their first; for the weights of a PEFT adapter, the name in
    adapter_model.safetensors; for the weights under an adapter, the name in the base model's checkpoint.

    A parameter that the checkpoint holds as several tensors, as the fused experts of a mixture, or as a part of one,
    comes with segments and its name in memory. A segment of a matrix, a tensor of two dimensions in the checkpoint, has
    its width. Where the checkpoint's tensor is no view of it (permuted, interleaved) it has only that name, and a
    warning says so: its noise is not that of the checkpoint's tensor.

    Raises:
        UserError: The model cannot be tuned (refuse_untunable).
    """
    model, base = unwrap(model), base_of(model)
    refuse_untunable(model)
    adapter = adapter_names(model)
    memory = {name: p for name, p in _once(base) if id(p) not in adapter}
    names = {id(p): name for name, p in memory.items()}
    stored, copied, error = _checkpoint_layout(base, memory)
    for name, parameter in model.named_parameters():
        if id(parameter) in adapter:
            yield NamedTensor(adapter[id(parameter)], parameter)
        elif id(parameter) not in names:
            yield NamedTensor(_clean(name), parameter)
        else:
            name = names[id(parameter)]
            name, segments = stored.get(name, (name, None))
            yield NamedTensor(name, parameter, segments)
    if copied:
        logger.warning(
            f"{len(copied)} parameter(s) draw noise by the name in memory, e.g. {copied[0]}, because the checkpoint "
            "holds them "
            + (f"in a form that cannot be found out: {error}" if error else "permuted or otherwise than as views")
        )


def unwrap(model: torch.nn.Module) -> Any:  # a module with attributes of transformers, or of PEFT
    """The model inside of torch.compile, DataParallel and their like."""
    inside: Any = model
    while list(inside._modules) in ([name] for name in ("module", *_WRAPPERS)) and not inside._parameters:
        (inside,) = inside._modules.values()
    return inside


def base_of(model: torch.nn.Module) -> Any:  # a module with attributes of transformers
    """The model itself, inside of wrappers and PEFT: what computes, and what a checkpoint of the whole model holds."""
    inside = unwrap(model)
    return unwrap(inside.get_base_model()) if is_peft(inside) else inside


def refuse_untunable(model: torch.nn.Module) -> None:
    """UserError for quantised weights, unless all that require grad are an adapter's over them (QLoRA), and for prompt
    learning."""
    refuse_prompt_learning(model)
    model, base = unwrap(model), base_of(model)
    reason = _quantised(base)
    if not reason:
        return
    adapter = adapter_names(model)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in adapter]
    if trainable or not adapter:
        own = f", of which only such as {trainable[0]} could be tuned" if trainable else ""
        raise UserError(
            f"{type(base).__name__} has quantised weights ({reason}){own}: give the unquantised model, or tune a LoRA "
            "adapter over this one, the rest frozen"
        )


def refuse_prompt_learning(model: torch.nn.Module) -> None:
    """UserError for an adapter whose virtual tokens are put in by PEFT's wrapper, which answers are not generated
    through."""
    inside = unwrap(model)
    for config in inside.peft_config.values() if is_peft(inside) else ():
        refuse_prompt_config(config)


def refuse_prompt_config(config) -> None:
    """refuse_prompt_learning of one peft.PeftConfig."""
    if getattr(config, "is_prompt_learning", False):
        raise UserError(
            f"the adapter learns a prompt ({config.peft_type.value}), and answers are generated without its virtual "
            "tokens: give one that changes layers, as LoRA"
        )


def _quantised(base: torch.nn.Module) -> str:
    """Why the weights of the model are no plain numbers, or "". transformers notes it on the model and in its config,
    and takes both away when it dequantises; others leave weights of another form."""
    config = getattr(getattr(base, "config", None), "quantization_config", None)
    if config is not None or getattr(base, "hf_quantizer", None) is not None:
        method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
        return str(
            getattr(method, "value", None) or method or type(base.hf_quantizer if config is None else config).__name__
        )
    for name, p in base.named_parameters():
        if not has_plain_memory(p):
            return f"{name} is a {type(p).__name__}"
        if not p.is_floating_point() or p.element_size() < 2:
            return f"{name} is {p.dtype}"
    for name, module in base.named_modules():  # those that keep packed weights elsewhere than in parameters
        if (hasattr(module, "in_features") or hasattr(module, "num_embeddings")) and next(
            module.parameters(), None
        ) is None:
            return f"{name} is a {type(module).__module__}.{type(module).__name__} without parameters"
    return ""


def has_plain_memory(tensor: torch.Tensor) -> bool:
    """Whether its values are where its data_ptr() says, as dtype and shape say: not those of a subclass around other
    tensors."""
    # There is no DTensor before its module is imported, which takes a second
    distributed = sys.modules.get("torch.distributed.tensor")
    return not is_traceable_wrapper_subclass(tensor) or (
        distributed is not None and isinstance(tensor, distributed.DTensor)
    )


def is_peft(model: torch.nn.Module) -> bool:
    """Whether `model` is a peft.PeftModel, asked without importing peft."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def _clean(name: str) -> str:
    """Without the components that wrappers, PEFT's included, put into a name."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return ".".join(part for part in name.split(".") if part not in (*_WRAPPERS, "base_layer", "original_module"))


def _once(base: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Each parameter under the first of its names that transformers does not tie to another one, which it leaves out of
    a file."""
    left_out = getattr(base, "all_tied_weights_keys", None) or {}  # before version 5 no model says it
    names: dict[int, list[str]] = {}
    for name, p in base.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(_clean(name))
    for p in base.parameters():
        yield next((name for name in names[id(p)] if name not in left_out), names[id(p)][0]), p


def adapter_names(model: torch.nn.Module) -> dict[int, str]:
    """id(parameter) -> key in adapter_model.safetensors, of the active adapter; empty without PEFT."""
    # An adapter that transformers loaded
    inside = not is_peft(model) and getattr(model, "_hf_peft_config_loaded", False)
    if not (is_peft(model) or inside):
        return {}
    from peft import get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    # A layer is asked, since the model's own active_adapters() may refuse the installed PEFT: transformers 5.24.0 wants
    # 0.22, which is not out.
    active: Any = next(layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)) if inside else model
    # save_embedding_layers: "auto" would ask the hub for the base model's config.
    state = get_peft_model_state_dict(
        model, model.state_dict(keep_vars=True), adapter_name=active.active_adapters[0], save_embedding_layers=False
    )
    return {id(p): ("base_model.model." if inside else "") + _wrapperless(key) for key, p in state.items()}


def _wrapperless(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


class _Tracing(TorchFunctionMode):
    """Under it the results of view operations stay views: `.contiguous()` does not copy, and what `torch.cat` joins is
    noted."""

    def __init__(self):
        super().__init__()
        self.joined: dict[int, tuple] = {}  # storage of a concatenation -> (it, its tensors, dimension)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.contiguous:
            return args[0]
        result = function(*args, **kwargs)
        if function in (torch.cat, torch.concat, torch.concatenate):
            tensors = kwargs["tensors"] if "tensors" in kwargs else args[0]
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            self.joined[_storage(result)] = (result, list(tensors), dim % result.ndim)
        return result


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata  # on the meta device every data_ptr is 0


def _checkpoint_layout(
    model: torch.nn.Module, memory: dict[str, torch.nn.Parameter]
) -> tuple[dict[str, tuple[str, list[Segment] | None]], list[str], str]:
    """How transformers would save the parameters `memory` (name -> parameter) of `model`.

    Returns what differs from memory (name -> (checkpoint name, None) or (name, segments)), the names that have no such
    description, and why if that is an error. The conversion that `save_pretrained` makes is run on meta tensors.
    """
    if not hasattr(model, "save_pretrained"):
        return {}, [], ""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before version 5 a model in memory is what the checkpoint is
        return {}, [], ""
    sources = {
        name: torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device="meta") for name, p in memory.items()
    }
    owners = {_storage(tensor): name for name, tensor in sources.items()}
    try:
        with torch.no_grad(), _Tracing() as tracing:
            saved = revert_weight_conversion(model, dict(sources))
    except Exception as error:  # noqa: BLE001 - any of transformers' converters may raise anything
        return {}, list(sources), next(iter(str(error).splitlines()), type(error).__name__)

    whole: dict[str, tuple[str, list[Segment] | None]] = {}
    parts: dict[str, list[Segment]] = {}
    covered = dict.fromkeys(sources, 0)
    for name, tensor in saved.items():
        owner = owners.get(_storage(tensor))
        if owner is not None and _same_order(tensor, sources[owner]):
            width = width_of(tensor.shape)
            same = width == width_of(sources[owner].shape)  # a table takes it from the tensor in memory
            whole[owner] = name, None if same else [Segment(name, 1, tensor.numel(), width=width)]
            covered[owner] += tensor.numel()
            continue
        for owner, offset, dims, first in _parts(tensor, owners, tracing.joined):
            segments = _segments(name, offset, dims, first, width_of(tensor.shape))
            parts.setdefault(owner, []).extend(segments)
            covered[owner] += sum(s.rows * s.cols for s in segments)
    exact = {name for name, n in covered.items() if n == sources[name].numel()}
    stored: dict[str, tuple[str, list[Segment] | None]] = {
        name: whole[name] if name in whole else (name, parts[name]) for name in exact & (whole.keys() | parts.keys())
    }
    return stored, [name for name in sources if name not in exact], ""


def _same_order(view: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether `view` is all of `source`, with the same row-major index."""
    if view.storage_offset() or view.numel() != source.numel():
        return False
    return (view.shape == source.shape and view.stride() == source.stride()) or (
        view.is_contiguous() and source.is_contiguous()
    )


def _parts(tensor, owners, joined) -> Iterator[tuple]:
    """(parameter, offset in it, [(size, stride in memory, stride of the index)], first index) of each part of a
    checkpoint's tensor that is a view of a parameter."""
    if _storage(tensor) in owners:
        pieces, whole, dim = [tensor], tensor, 0
    elif _storage(tensor) in joined and _same_order(tensor, joined[_storage(tensor)][0]):
        whole, pieces, dim = joined[_storage(tensor)]
    else:
        return
    index_strides = [math.prod(whole.shape[i + 1 :]) for i in range(whole.ndim)]
    first = 0
    for piece in pieces:
        if (owner := owners.get(_storage(piece))) is not None:
            yield (
                owner,
                piece.storage_offset(),
                list(zip(piece.shape, piece.stride(), index_strides, strict=True)),
                first,
            )
        first += piece.shape[dim] * index_strides[dim] if piece.ndim else 0


def width_of(shape: Sequence[int]) -> int | None:
    """What a Segment of a tensor of this shape in the checkpoint has as its width: the columns of a matrix."""
    return (shape[1] or None) if len(shape) == 2 else None


def _segments(name, offset, dims, first, width) -> list[Segment]:
    """The Segments of one part, without any if its columns are not contiguous."""
    merged: list[tuple[int, int, int]] = []  # innermost last
    for size, stride, index_stride in dims:
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride and merged[-1][2] == size * index_stride:
            merged[-1] = (merged[-1][0] * size, stride, index_stride)
        else:
            merged.append((size, stride, index_stride))
    cols = 1
    if merged:
        cols, *strides = merged.pop()
        if strides != [1, 1]:
            return []
    rows, row_stride, index_stride = merged.pop() if merged else (1, cols, cols)
    if rows > 1 and not rows_fit(width, first, cols, index_stride):
        # Of several rows of the matrix each, or parts of two: one by one
        merged.append((rows, row_stride, index_stride))
        rows, row_stride, index_stride = 1, cols, cols
    if math.prod(size for size, *_ in merged) > MAX_SEGMENTS_PER_TENSOR:  # an interleave
        return []
    return [
        Segment(
            name,
            rows,
            cols,
            offset + sum(i * stride for i, (_, stride, _) in zip(outer, merged, strict=True)),
            row_stride,
            first + sum(i * stride for i, (*_, stride) in zip(outer, merged, strict=True)),
            index_stride,
            width,
        )
        for outer in itertools.product(*(range(size) for size, *_ in merged))
    ]
