"""LoRA adapters, by PEFT: made, put over a base model, merged into its weights."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import torch

import es_kernels
from es_finetune.errors import UserError, first_line, loading, require
from es_finetune.models.checkpoint_names import base_of, named_segments

# Of the first values of every new adapter, whatever the run's seed: runs that differ in it start from one model
LORA_SEED = 0
# Share of the largest logit: 1/16 of what bfloat16 rounds. In float32 a right merge is off by about 1e-6; wrong ones
# were by 1e-3 (Jamba) and more.
_SAME_LOGITS = 2**-13


def import_peft() -> Any:
    """The module peft. UserError, with the extra that brings it, where it is not installed."""
    require("an adapter", "lora", "peft")
    import peft

    return peft


def add_lora(base: torch.nn.Module, rank: int) -> torch.nn.Module:
    """`base` under a new LoRA adapter of all its linear layers but the output, alpha 2 * rank. It computes what it did:
    B is 0. A is the same on every machine."""
    peft = import_peft()
    # Llama 4's and PhiMoE's routers are linear layers that return a tuple, which PEFT cannot wrap.
    routers = [
        name
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and type(module).__name__.endswith("Router")
    ]
    options = {"target_modules": "all-linear", "exclude_modules": routers or None}
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, task_type="CAUSAL_LM", **options)
    with loading(f"LoRA adapter of {type(base).__name__}"), torch.random.fork_rng(devices=[]):
        model = peft.get_peft_model(base, config)
    # Instead of PEFT's own draw for A, which depends on the device and on torch's version: the kernels' noise, with the
    # same variance, 1 / (3 * inputs). B starts at 0.
    with torch.no_grad():
        for name, parameter, _ in named_segments(model):
            if parameter.requires_grad and "lora_A" in name.split("."):
                es_kernels.add_noise_(
                    parameter.zero_(), [LORA_SEED], [1 / math.sqrt(3 * parameter.shape[1])], name=name
                )
    return model


def merged_copy(model: torch.nn.Module) -> Any:
    """A copy on the CPU with the adapter added into the weights.

    Raises:
        UserError: The copy would compute otherwise. PEFT adds more than once into weights that layers share (Zamba),
            and into some that its layers do not compute with (Jamba). Or PEFT cannot add this kind of adapter at all.
    """
    kind = type(base_of(model)).__name__
    exact = _cpu_copy(model, torch.float32)
    attention = base_of(exact).config._attn_implementation
    if attention not in ("eager", "sdpa"):  # what is for GPUs
        base_of(exact).set_attn_implementation("eager")
    ids = torch.arange(16)[None] % base_of(exact).config.get_text_config().vocab_size
    with torch.no_grad():
        before = exact(input_ids=ids, use_cache=False).logits
        after = _merge(exact, kind)(input_ids=ids, use_cache=False).logits
        error = (after - before).abs().max() / before.abs().max()
    if not error <= _SAME_LOGITS:
        raise UserError(
            f"PEFT cannot add this adapter into the weights of {kind}: logits would be off by {error:.1g} of the "
            "largest; write the adapter, without merge_lora"
        )
    del exact
    return _merge(_cpu_copy(model), kind)


def _merge(model: Any, kind: str) -> Any:
    try:
        return model.merge_and_unload()
    except Exception as error:  # of any type, by what an adapter's layers cannot do
        raise UserError(
            f"PEFT cannot add this adapter into the weights of {kind}: {first_line(error)}; write the adapter, without "
            "merge_lora"
        ) from error


def _cpu_copy(model: torch.nn.Module, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """A copy; `dtype`: of its floating-point tensors, if not their own."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        copied = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None, copy=True)
        return torch.nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else copied

    # Of which deepcopy makes no copies of its own
    memo = {id(t): moved(t) for t in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo)
