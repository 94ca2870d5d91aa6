"""What runs inside vLLM's own worker processes, beside each of its replicas' shards: the run's weights over vLLM's
parameters, under the names of the checkpoint.

vLLM fuses q, k, v and gate, up into one tensor, pads the vocabulary and cuts tensors over GPUs. The noise of an element
is that of its place in the checkpoint's tensor, so each parameter here becomes the checkpoint's tensors again: views of
rows, and segments where a tensor is cut.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers import utils
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.platforms import current_platform

import es_kernels
from es_finetune.config import TrainConfig
from es_finetune.errors import UserError
from es_finetune.models.checkpoint_names import width_of
from es_finetune.models.members import MemberNoise, scaled_factors
from es_finetune.runs.setup import make_optimizer, make_schedules
from es_finetune.workers.weights import Weights

if current_platform.is_cpu():
    # On a CPU vLLM packs the weight of each linear layer for its own matrix product and leaves an empty one behind: a
    # change in place would reach 8 % of a model. This module is imported before the model is loaded.
    def _plain(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = _plain


class Part(NamedTuple):
    """The part of one of the checkpoint's tensors that this process holds."""

    name: str
    tensor: torch.Tensor  # a view of vLLM's parameter
    first: int  # row-major index in the checkpoint's tensor of the view's first element
    index_stride: int  # from one row of the view to the next
    counted: bool  # by this process; not where another one holds the same

    @property
    def shape(self) -> tuple[int, int]:
        """As rows and columns."""
        return (math.prod(self.tensor.shape[:-1]), self.tensor.shape[-1])

    def segment(self, shape: Sequence[int]) -> es_kernels.Segment:
        """`shape`: of the checkpoint's tensor."""
        rows, cols = self.shape
        return es_kernels.Segment(
            self.name,
            rows,
            cols,
            row_stride=self.tensor.stride(0) if self.tensor.ndim > 1 else cols,
            first=self.first,
            index_stride=self.index_stride,
            width=width_of(shape),
        )


def parts_of(model: torch.nn.Module, rank: int) -> Iterator[Part]:
    """Every parameter of a vLLM model as parts of the checkpoint's tensors. ValueError for a layer whose layout is not
    known here."""
    fused = getattr(model, "packed_modules_mapping", {})
    seen: set[int] = set()
    for path, layer in model.named_modules():
        prefix = path.removesuffix(".base_layer")  # of a layer with adapters
        for kind, parameter in layer.named_parameters(recurse=False):
            name = f"{prefix}.{kind}" if prefix else kind
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if not parameter.numel():
                raise UserError(
                    f"vLLM has taken the weights out of {name} and keeps them in a layout of its own, which cannot be "
                    "perturbed: turn that off"
                )
            if parameter.dtype not in es_kernels.segment.DTYPES:
                raise UserError(
                    f"{name} is {parameter.dtype} in vLLM: quantised weights cannot be perturbed; give a model of "
                    "bfloat16, float16 or float32"
                )
            yield from _parts(layer, prefix, kind, parameter.data, fused, rank)


def _parts(
    layer, prefix: str, kind: str, tensor: torch.Tensor, fused: dict[str, list[str]], rank: int
) -> Iterator[Part]:
    whole = f"{prefix}.{kind}" if prefix else kind
    cols = tensor.shape[-1] if tensor.ndim > 1 else 1

    def rows(name: str, start: int, count: int, first: int, counted: bool = True) -> Part:
        """`count` rows from `start` on, which are those from `first` on in the checkpoint's tensor."""
        return Part(name, tensor[start : start + count], first * cols, cols if tensor.ndim > 1 else count, counted)

    if isinstance(layer, LinearBase):
        if not isinstance(layer.quant_method, UnquantizedLinearMethod):
            raise UserError(
                f"{prefix} is quantised ({type(layer.quant_method).__name__}), and such weights cannot be perturbed: "
                "give the unquantised model"
            )
        expected = {"weight": 2, "bias": 1}
        if kind not in expected or tensor.ndim != expected[kind]:
            raise UserError(
                f"{whole} has a layout of vLLM's own ({type(layer).__name__}, shape {tuple(tensor.shape)}), which "
                "cannot be perturbed"
            )
    parent, _, module = prefix.rpartition(".")
    names = [f"{parent}.{part}.{kind}" if parent else f"{part}.{kind}" for part in fused.get(module, [module])]
    if isinstance(layer, QKVParallelLinear):
        heads, kv = layer.num_heads * layer.head_size, layer.num_kv_heads * layer.head_size
        v = layer.num_kv_heads * layer.v_head_size
        place, once = divmod(layer.tp_rank, layer.num_kv_head_replicas)
        yield rows(names[0], 0, heads, layer.tp_rank * heads)
        yield rows(names[1], heads, kv, place * kv, counted=not once)
        yield rows(names[2], heads + kv, v, place * v, counted=not once)
    elif isinstance(layer, MergedColumnParallelLinear) and len(names) == len(layer.output_sizes):
        start = 0
        for name, size in zip(names, layer.output_sizes, strict=True):
            mine = size // layer.tp_size
            yield rows(name, start, mine, layer.tp_rank * mine)
            start += mine
    elif type(layer) is ColumnParallelLinear:
        yield rows(whole, 0, len(tensor), layer.tp_rank * len(tensor))
    elif type(layer) is RowParallelLinear and kind == "weight":
        yield Part(whole, tensor, layer.tp_rank * cols, cols * layer.tp_size, True)
    elif isinstance(layer, VocabParallelEmbedding):
        shard = layer.shard_indices
        if shard.num_added_elements:
            raise UserError(
                f"{prefix} has tokens added by vLLM, which the checkpoint does not have: load the model without them"
            )
        yield rows(whole, 0, shard.num_org_elements, shard.org_vocab_start_index)
    elif (
        isinstance(layer, LinearBase)
        and not isinstance(layer, (ReplicatedLinear, RowParallelLinear))
        or "expert" in whole
    ):
        raise UserError(
            f"how vLLM lays out {whole} ({type(layer).__name__}) is not known here: use --engine hf for this model"
        )
    else:
        view = tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim > 2 else tensor
        yield Part(whole, view, 0, tensor.shape[-1] if tensor.ndim else 1, rank == 0)


class Slots(NamedTuple):
    """Where vLLM's adapters hold what is added to one of the checkpoint's matrices: as many as they, one after the
    other. A layer computes x W^T + (x a^T) b^T with those of a row's adapter."""

    part: Part  # of the matrix
    shape: tuple[int, int]  # of the matrix
    a: torch.Tensor  # [adapters, rank, columns of the part]
    b: torch.Tensor  # [adapters, rows of the part, rank]

    def put(self, noise: MemberNoise) -> None:
        """Each member's noise into one adapter, from the first on."""
        rows, cols = self.part.shape
        row, col = divmod(self.part.first, self.shape[1])
        left, right = scaled_factors({self.part.name: self.shape}, noise, self.a.device)[self.part.name]
        members, rank = len(noise.seeds), noise.noise_rank
        self.b[:members, :, :rank].copy_(left[:, row : row + rows])
        self.a[:members, :rank].copy_(right[:, col : col + cols].mT)


def slots_of(
    layers: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], fused: dict[str, list[str]], rank: int
) -> Iterator[Slots]:
    """Those of vLLM's layers with adapters. A fused layer has one for each of the checkpoint's matrices, or none that
    is known here. `shapes`: of the checkpoint's tensors; `fused`: the model's packed_modules_mapping."""
    for prefix, layer in layers.items():
        parts = list(_parts(layer.base_layer, prefix, "weight", layer.base_layer.weight.data, fused, rank))
        for part, a, b in zip(parts, layer.lora_a_stacked, layer.lora_b_stacked, strict=False):
            rows, cols = shapes[part.name]
            if (b.shape[2], a.shape[3]) == part.shape:
                yield Slots(part, (rows, cols), a[:, 0], b[:, 0])


class Extension:
    """Methods that vLLM adds to its workers (worker_extension_cls); the driver calls them by collective_rpc."""

    # The worker's own
    rank: int
    get_model: Callable[[], torch.nn.Module]
    model_runner: Any

    def es_build(
        self,
        config: dict[str, Any],
        shapes: dict[str, list[int]],
        shared: Sequence[str] | None = None,
        members: int = 0,
    ) -> dict[str, Any]:
        """Makes the run's weights over this worker's part of the model. `shapes`: of the checkpoint's tensors;
        `shared`: names of the matrices in which so many members differ that share a batch; None, if they are put in
        place. Returns how many elements of each tensor this worker counts, or {"error": why the model is refused};
        nothing is changed."""
        try:
            rank = self.rank
            self.es_parts = list(parts_of(self.get_model(), rank))
            for part in self.es_parts:
                if part.name not in shapes:
                    raise UserError(
                        f"vLLM has a parameter {part.name} that the checkpoint has not: use --engine hf for this model"
                    )
                last = part.first + (part.shape[0] - 1) * part.index_stride + part.shape[1]
                if last > math.prod(shapes[part.name]):
                    raise UserError(
                        f"{part.name} has {tuple(part.tensor.shape)} elements in vLLM, and {shapes[part.name]} in the "
                        "checkpoint"
                    )
            entries = [_entry(part, shapes[part.name]) for part in self.es_parts]
            slots = {} if shared is None else self._slots(shapes, shared, members)
            options = TrainConfig(**config)
            self.es_weights = _Sharded(
                entries,
                make_optimizer(entries, options, shared),
                make_schedules(options),
                bool(options.health_every),
                shared is None,
                counted=[part.counted for part in self.es_parts],
                slots=slots,
            )
        except (ValueError, TypeError) as error:
            return {"error": str(error)}
        covered: dict[str, int] = {}
        for part in self.es_parts:
            covered[part.name] = covered.get(part.name, 0) + part.counted * math.prod(part.shape)
        return {"covered": covered, "backend": es_kernels.active_backend(self.es_parts[0].tensor.device)}

    def _slots(self, shapes: dict[str, list[int]], shared: Sequence[str], members: int) -> dict[str, Slots]:
        """By the names of the matrices, all of `shared`. So many adapters, 1 and up, are made known to vLLM, which
        writes zeros into each one's slot, and from then on nothing."""
        manager = self.model_runner.lora_manager
        with manager.dummy_lora_cache():
            for number in range(1, members + 1):
                adapter = LoRARequest(f"member {number - 1}", number, "in memory")
                manager.add_dummy_lora(adapter, rank=1)
                manager.add_adapter(adapter)
        layers = manager._adapter_manager
        if layers.lora_index_to_id != list(range(1, members + 1)):
            raise UserError("vLLM orders its adapters otherwise than they were added: give --members_at_once 1")
        fused = getattr(self.get_model(), "packed_modules_mapping", {})
        slots = {each.part.name: each for each in slots_of(layers.modules, shapes, fused, self.rank)}
        missing = [name for name in shared if name not in slots]
        if missing:
            raise UserError(
                f"vLLM has no adapter for {missing[0]} by itself: members cannot share a batch there; give "
                "--members_at_once 1, or use --engine hf for this model"
            )
        return {name: slots[name] for name in shared}

    def es_call(self, method: str, *arguments: Any) -> Any:
        """A method of weights.Weights, or `put_members`."""
        try:
            result = getattr(self.es_weights, method)(*arguments)
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # whichever stream vLLM computes on next
            return {"result": result}
        except (ValueError, OSError, RuntimeError) as error:  # as text, for vLLM's wire keeps no types of errors
            return {"error": str(error)}

    def es_write(self, folder: str) -> str:
        """This worker's part of the live weights, as a file in the folder: safetensors of the parts that it counts,
        with their places as metadata. Returns its path."""
        from safetensors.torch import save_file

        counted = [part for part in self.es_parts if part.counted]
        places = {str(number): [part.name, part.first, part.index_stride] for number, part in enumerate(counted)}
        tensors = {
            str(number): part.tensor.reshape(part.shape).to("cpu", copy=True).contiguous()
            for number, part in enumerate(counted)
        }
        path = Path(folder) / f"part-{self.rank}.safetensors"
        save_file(tensors, path, metadata={"places": json.dumps(places)})
        return str(path)


def _entry(part: Part, shape: list[int]) -> es_kernels.NamedTensor:
    """As named_segments gives them: without segments where the view is all of the checkpoint's tensor."""
    tensor = part.tensor.detach().requires_grad_()
    if part.first == 0 and list(tensor.shape) == shape:
        return es_kernels.NamedTensor(part.name, tensor)
    return es_kernels.NamedTensor(part.name, tensor, [part.segment(shape)])


class _Sharded(Weights):
    """Weights of which this process has a part; the fingerprints are of what it counts, so that those of all processes
    add up to the model's. Members that share a batch are put into `slots`, by the names of the matrices."""

    def __init__(
        self,
        entries: list[es_kernels.NamedTensor],
        *of_weights: Any,
        counted: list[bool],
        slots: Mapping[str, Slots] | None = None,
    ):
        super().__init__(entries, *of_weights)
        self.slots = slots or {}
        if all(counted):
            return
        self.entries = [entry for entry, once in zip(entries, counted, strict=True) if once]
        names = {entry.name for entry in self.entries}

        def fingerprint(of: str = "theta") -> int:
            tables = [getattr(weights, of) for weights in self.optimizer.tables]
            kept = [entry for table in tables for entry in table.entries if entry.name in names]
            return es_kernels.fingerprint(es_kernels.ParamTable(kept))

        self.optimizer.fingerprint = fingerprint  # type: ignore[method-assign]  # of this process's share

    def put_members(self, noise: Sequence[Sequence[Any]]) -> None:
        """Each member's own into one of vLLM's adapters. `noise`: MemberNoise of each param_group."""
        for group in noise:
            members = MemberNoise(*group)
            for name in members.names:
                self.slots[name].put(members)
