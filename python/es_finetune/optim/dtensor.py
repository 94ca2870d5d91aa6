"""Sharded models: which part of the whole tensor the memory of this process is.

A DTensor (FSDP2, tensor parallelism) draws the noise of its place in the whole tensor, so that neither the number of
processes nor the layout changes a bit of the model. No parameter is gathered, and only `fingerprint` communicates.
Without DTensors nothing here touches torch.distributed.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

import es_kernels
from es_finetune.errors import UserError
from es_finetune.models.checkpoint_names import width_of
from es_kernels import NamedTensor, Segment
from es_kernels.segment import MAX_SEGMENTS_PER_TENSOR, rows_fit

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def live_table(entries: Sequence[NamedTensor]) -> es_kernels.ParamTable:
    """The table of what the model computes with: over this process's memory where a parameter is sharded.

    Args:
        entries: The parameters, f32, bf16 or f16, some of them DTensors.

    Returns:
        A ShardedTable if any is a DTensor or under fully_shard, else a plain ParamTable.

    Raises:
        TypeError: A tensor is not f32, bf16 or f16.
        UserError: A parameter is part of FullyShardedDataParallel's flat parameter, a shard's place is unknown, or the
            kernels cannot read the weights.
    """
    modules = _fsdp_modules([entry.tensor for entry in entries])
    for name, parameter, _ in entries:
        if getattr(parameter, "_fsdp_flattened", False):
            raise UserError(
                f"{name!r} is a part of a FullyShardedDataParallel's flat parameter, which has lost its place: shard "
                "the model with fully_shard"
            )
    if modules or any(is_sharded(entry.tensor) for entry in entries):
        return ShardedTable(entries, modules)
    try:
        return es_kernels.ParamTable(entries)
    except ValueError as error:  # of weights that the kernels cannot read, as of two that overlap in memory
        raise UserError(str(error)) from error


def fingerprint(table: es_kernels.ParamTable, live: es_kernels.ParamTable) -> int:
    """Fingerprint of the whole tensors of `table`: with sharded ones a collective of the processes that share them.

    Args:
        table: Laid out as `live`: theta, the anchor, or `live` itself.
        live: The table that knows which parameters are sharded.

    Returns:
        A u64. Waits for the device.

    Raises:
        RuntimeError: The memory of `table` moved.
    """
    if not isinstance(live, ShardedTable):
        return es_kernels.fingerprint(table)
    table.check_unmoved()
    parts: dict[tuple, list[NamedTensor]] = {}
    for name, tensor, segments in zip(table.names, table.tensors, table.layout.segments, strict=True):
        parts.setdefault(live.groups.get(name, ()), []).append(NamedTensor(name, tensor, segments))
    return sum(_summed(es_kernels.fingerprint(entries), groups) for groups, entries in parts.items()) % 2**64


def whole_tensors(table: es_kernels.ParamTable, live: es_kernels.ParamTable) -> dict[str, torch.Tensor]:
    """The tensors of `table` by name.

    Args:
        table: Laid out as `live`.
        live: The table that knows which parameters are sharded.

    Returns:
        Detached, over the same memory: DTensors where `live` has them.
    """
    parameters: dict[str, Any] = live.parameters if isinstance(live, ShardedTable) else {}
    tensors = {name: tensor.detach() for name, tensor in zip(table.names, table.tensors, strict=True)}
    return {
        name: _like(parameters[name], tensor) if is_sharded(parameters.get(name)) else tensor
        for name, tensor in tensors.items()
    }


def is_sharded(tensor: object) -> TypeGuard[DTensor]:
    """Whether it is a DTensor.

    There is none before torch.distributed.tensor is imported, which takes a second: this does not import it.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


class ShardedTable(es_kernels.ParamTable):
    """A ParamTable of parameters of which some are DTensors: over the memory they have in this process.

    Before each use of it FSDP gives up what it gathered for a forward, which would hold the weights of before the
    write.

    Args:
        entries: The parameters, f32, bf16 or f16.
        modules: The modules under fully_shard that hold any of them.

    Attributes:
        parameters: Name -> the parameter, as the model holds it.
        groups: Name -> the (device type, process group) pairs over which a sharded parameter is spread.

    Raises:
        UserError: An entry is FSDP's gathered copy, or a shard's place is unknown (see `local_entry`).
    """

    def __init__(self, entries: Sequence[NamedTensor], modules: list):
        parameters = {id(parameter) for module in modules for parameter in module.parameters()}
        _reshard(modules)
        gathered = parameters - {id(parameter) for module in modules for parameter in module.parameters()}
        for name, parameter, _ in entries:
            if id(parameter) in gathered:
                raise UserError(f"{name!r} was FSDP's gathered copy, now given up: pass model.named_parameters() again")
        self._modules = modules
        self.parameters: dict[str, Any] = {name: parameter for name, parameter, _ in entries}
        entries = [
            local_entry(entry.name, entry.tensor, entry.segments) if is_sharded(entry.tensor) else entry
            for entry in entries
        ]
        self.groups = {name: _groups(parameter) for name, parameter in self.parameters.items() if is_sharded(parameter)}
        super().__init__(entries)

    def check_unmoved(self):
        _reshard(self._modules)
        super().check_unmoved()

    def _changed(self):
        # Of the parameters, not of the table's own tensors: model.to() and load_state_dict(assign=True) give a DTensor
        # another local tensor.
        moved = self._moved()
        return super()._changed() if moved is None else moved

    def _moved(self):
        for i, (name, tensor) in enumerate(zip(self.names, self.tensors, strict=True)):
            if name in self.groups and local(self.parameters[name]).data_ptr() != tensor.data_ptr():
                return i
        return None

    def refresh(self):
        if self._moved() is not None:
            raise RuntimeError(
                "a sharded parameter has another local tensor than when the table was built: build a new one"
            )
        return super().refresh()


def local_entry(name: str, parameter: DTensor, segments: Sequence[Segment] | None = None) -> NamedTensor:
    """The part of a sharded parameter that this process holds.

    Args:
        name: Of the whole tensor.
        parameter: The DTensor, of any shape and layout that tells each element's place.
        segments: Those of the whole tensor; None: it is one.

    Returns:
        Its memory in this process, with the Segments of that.

    Raises:
        UserError: The layout does not tell each element's place or has more pieces than a table takes, this process is
            not on its mesh, or its memory is not what the layout says or not contiguous.
    """
    shard, mesh = local(parameter), parameter.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise UserError(f"{name!r} is on a device mesh that this process is not part of: leave it out here")
    runs = [[(0, size)] for size in parameter.shape]
    for dim, mesh_dim, factor in _splits(name, parameter):
        pieces = [_chunk(runs[dim], factor, k) for k in range(factor)]
        runs[dim] = [run for piece in pieces for run in _chunk(piece, mesh.size(mesh_dim), coordinate[mesh_dim])]
    shape = [sum(length for _, length in of_dim) for of_dim in runs]
    if list(shard.shape) != shape and (shard.numel() or math.prod(shape)):
        raise UserError(
            f"{name!r} has {tuple(shard.shape)} in this process where {_layout(parameter)} of {tuple(parameter.shape)} "
            f"gives {tuple(shape)}: shard it as distribute_tensor does"
        )
    if not (shard.is_contiguous() and parameter.is_contiguous()):
        raise UserError(
            f"{name!r} is sharded and not contiguous, with strides {shard.stride()} of {parameter.stride()}: make it "
            "contiguous before sharding it"
        )
    if segments is None:
        segments = [Segment(name, 1, parameter.numel(), width=width_of(parameter.shape))]
    boxes = (
        list(itertools.islice(_boxes(runs, shape, parameter.shape), MAX_SEGMENTS_PER_TENSOR + 1))
        if shard.numel()
        else []
    )
    shard_segments = _merged(piece for whole in segments for box in boxes for piece in _meeting(whole, box))
    if max(len(boxes), len(shard_segments)) > MAX_SEGMENTS_PER_TENSOR:
        raise UserError(
            f"{name!r}, {_layout(parameter)}, would be in more than {MAX_SEGMENTS_PER_TENSOR} pieces in a process: "
            "shard it in another dimension"
        )
    return NamedTensor(name, shard, shard_segments)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a DTensor in this process; of any other tensor, itself."""
    # To_local() would cost a dispatch for each parameter and use
    return tensor._local_tensor.detach() if is_sharded(tensor) else tensor


def check_same_layout(name: str, saved: torch.Tensor, mine: torch.Tensor) -> None:
    """Check that each process has the same part of both tensors.

    Args:
        name: Of the tensor, for the error.
        saved: From a state.
        mine: The optimizer's.

    Raises:
        UserError: It has not.
    """
    if (is_sharded(saved) or is_sharded(mine)) and not (
        is_sharded(saved)
        and is_sharded(mine)
        and saved.device_mesh == mine.device_mesh
        and _splits(name, saved) == _splits(name, mine)
    ):
        own, other = (_layout(tensor) if is_sharded(tensor) else "whole" for tensor in (mine, saved))
        raise UserError(
            f"{name!r} is {own}, and in the saved state {other}: load the state by torch.distributed.checkpoint, "
            "which shards it as this one is"
        )


def _like(parameter: DTensor, memory: torch.Tensor) -> torch.Tensor:
    """`memory` as a DTensor laid out as `parameter`, whatever its dtype and device: from_local would copy it to the
    mesh's device."""
    from torch.distributed.tensor import DTensor

    spec: Any = parameter._spec
    meta = spec.tensor_meta._replace(dtype=memory.dtype)
    return DTensor(memory, dataclasses.replace(spec, tensor_meta=meta), requires_grad=False)


def _layout(parameter: DTensor) -> str:
    return f"sharded {list(parameter.placements)} over a mesh of {tuple(parameter.device_mesh.shape)}"


def _splits(name: str, parameter: DTensor) -> list[tuple[int, int, int]]:
    """The splits that made the shards, in order: (dimension of the tensor, of the mesh, factor). What there is of the
    dimension is cut into `factor` pieces, and each of these over the dimension of the mesh.

    Placements are read from left to right, each with its split_factor (1 for Shard), unless another order of splits
    with factor 1 explains them: a _StridedShard's factor is then the number of pieces that dimensions to its right had
    made before. That is how FSDP2 says that it splits what tensor parallelism has split. The readings differ in uneven
    sizes, where torch's compute_local_shape_and_global_offset is wrong about FSDP2: of 9 rows over 4 x 2 processes the
    last is elsewhere.
    """
    from torch.distributed.tensor.placement_types import Replicate, Shard, _StridedShard

    placements, mesh = parameter.placements, parameter.device_mesh
    for placement in placements:
        if type(placement) not in (Replicate, Shard, _StridedShard):
            raise UserError(
                f"{name!r} is placed {placement} on its mesh, which does not tell each element's place: redistribute "
                "it to Shard or Replicate first"
            )
    split: list[tuple[int, Any]] = [
        (i, placement) for i, placement in enumerate(placements) if not isinstance(placement, Replicate)
    ]
    explicit = getattr(parameter._spec, "shard_order", None)
    if explicit is not None:  # newer versions of torch, where no placement is a _StridedShard
        return [(entry.tensor_dim, mesh_dim, 1) for entry in explicit for mesh_dim in entry.mesh_dims]
    left_to_right = [
        (placement.dim, i, int(placement.split_factor) if isinstance(placement, _StridedShard) else 1)
        for i, placement in split
    ]
    orders: dict[int, list[int]] = {}
    for dim, mesh_dim, factor in reversed(left_to_right):
        order = orders.setdefault(dim, [])
        pieces = [math.prod(mesh.size(i) for i in order[:k]) for k in range(len(order) + 1)]
        if factor not in pieces:
            return left_to_right
        order.insert(pieces.index(factor), mesh_dim)
    return [(dim, mesh_dim, 1) for dim, order in orders.items() for mesh_dim in order]


def _chunk(runs: list[tuple[int, int]], n: int, number: int) -> list[tuple[int, int]]:
    """Piece `number` of n, by torch.chunk's rule, of the (start, length) runs joined."""
    size = sum(length for _, length in runs)
    most = -(-size // n)
    begin, end = min(number * most, size), min((number + 1) * most, size)
    chunk, at = [], 0
    for start, length in runs:
        first, last = max(begin, at), min(end, at + length)
        if first < last:
            chunk.append((start + first - at, last - first))
        at += length
    return chunk


def _boxes(runs: list[list[tuple[int, int]]], shape: Sequence[int], whole: Sequence[int]) -> Iterator[Segment]:
    """The local memory, of this shape, as Segments of the row-major index of the whole: some for each choice of a run
    in every dimension."""
    strides, whole_strides = ([math.prod(sizes[i + 1 :]) for i in range(len(sizes))] for sizes in (shape, whole))
    places = []  # per dimension: (start in memory, start in the whole, length) of each run
    for of_dim in runs:
        ends = itertools.accumulate(length for _, length in of_dim)
        places.append([(end - length, start, length) for end, (start, length) in zip(ends, of_dim, strict=True)])
    for box in itertools.product(*places):
        offset = sum(start * stride for (start, _, _), stride in zip(box, strides, strict=True))
        first = sum(start * stride for (_, start, _), stride in zip(box, whole_strides, strict=True))
        # (size, stride in memory, in the whole), innermost last, neighbours joined where both go on
        dims: list[tuple[int, int, int]] = []
        longer = [(n, *steps) for (_, _, n), *steps in zip(box, strides, whole_strides, strict=True) if n > 1]
        for n, stride, whole_stride in (*longer, (1, 1, 1)):
            if dims and dims[-1][1:] == (n * stride, n * whole_stride):
                dims[-1] = dims[-1][0] * n, stride, whole_stride
            else:
                dims.append((n, stride, whole_stride))
        cols = dims.pop()[0]
        rows, stride, whole_stride = dims.pop() if dims else (1, cols, cols)
        for outer in itertools.product(*(range(n) for n, _, _ in dims)):
            at, index = (sum(i * dim[k] for i, dim in zip(outer, dims, strict=True)) for k in (1, 2))
            yield Segment("", rows, cols, offset + at, stride, first + index, whole_stride)


def _meeting(whole: Segment, box: Segment) -> Iterator[Segment]:
    """The part of `whole`, a Segment of the whole tensor, that is in `box`, a Segment of memory in the index of the
    whole tensor."""
    a, b = (whole.offset, whole.rows, whole.cols, whole.row_stride), (box.first, box.rows, box.cols, box.index_stride)
    few, many = (a, b) if whole.rows <= box.rows else (b, a)
    for row in range(few[1]):
        begin = few[0] + row * few[3]
        for at, rows, cols, stride in _in_rows(begin, begin + few[2], *many):
            in_whole, in_box = (
                [divmod(i - start, step) if n > 1 else (0, i - start) for i in (at, at + stride)]
                for start, n, _, step in (a, b)
            )
            offset, next_offset = (box.offset + r * box.row_stride + c for r, c in in_box)
            first, next_first = (whole.first + r * whole.index_stride + c for r, c in in_whole)
            steps = (next_offset - offset, next_first - first) if rows > 1 else (cols, cols)
            if rows == 1 or rows_fit(whole.width, first, cols, steps[1]):
                yield Segment(whole.name, rows, cols, offset, steps[0], first, steps[1], whole.width)
            else:
                for r in range(rows):
                    at, index = offset + r * steps[0], first + r * steps[1]
                    yield Segment(whole.name, 1, cols, at, first=index, width=whole.width)


def _in_rows(
    begin: int, end: int, first: int, rows: int, cols: int, stride: int
) -> Iterator[tuple[int, int, int, int]]:
    """The places begin <= i < end in these rows, as (first, rows, cols, stride): part of a row, whole rows, part of a
    row."""
    stride = stride if rows > 1 else cols
    low, high = max(0, (begin - first - cols) // stride + 1), min(rows, -(-(end - first) // stride))
    whole = range(low + (begin > first + low * stride), high - (end < first + (high - 1) * stride + cols))
    for row in sorted({low, *whole[:1], high - 1}) if low < high else ():
        at, stop = max(begin, first + row * stride), min(end, first + row * stride + cols)
        if row not in whole:
            yield at, 1, stop - at, stop - at
        elif row == whole.start:
            yield at, len(whole), cols, stride


def _merged(pieces: Iterable[Segment]) -> list[Segment]:
    """Single rows that follow each other at equal distances, joined."""
    merged: list[Segment] = []
    for piece in pieces:
        if merged and piece.rows == 1 and (piece.name, piece.cols) == (merged[-1].name, merged[-1].cols):
            last = merged[-1]
            steps = (
                piece.offset - last.offset - (last.rows - 1) * last.row_stride,
                piece.first - last.first - (last.rows - 1) * last.index_stride,
            )
            equal = min(steps) >= piece.cols and (last.rows == 1 or steps == (last.row_stride, last.index_stride))
            if equal and rows_fit(last.width, last.first, last.cols, steps[1]):
                merged[-1] = dataclasses.replace(last, rows=last.rows + 1, row_stride=steps[0], index_stride=steps[1])
                continue
        merged.append(piece)
    return merged


def _groups(parameter: DTensor) -> tuple:
    """The (device type, process group) pairs whose processes hold different parts of a DTensor: not those that hold the
    same."""
    mesh = parameter.device_mesh
    return tuple(
        (mesh.device_type, mesh.get_group(dim))
        for dim, placement in enumerate(parameter.placements)
        if not placement.is_replicate()
    )


def _summed(value: int, groups: Iterable[tuple]) -> int:
    """The sum of `value` mod 2^64 over these process groups."""
    for device, group in groups:
        halves = torch.tensor([value & 0xFFFFFFFF, value >> 32], device=device)  # whose sums do not overflow int64
        torch.distributed.all_reduce(halves, group=group)
        low, high = halves.tolist()
        value = (low + (high << 32)) % 2**64
    return value


def _fsdp_modules(parameters: Sequence[torch.Tensor]) -> list[torch.nn.Module]:
    """The modules under fully_shard that hold any of these, or a copy gathered of them."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not hasattr(fsdp, "FSDPModule"):
        return []
    from torch.distributed._composable_state import _module_state_mapping  # a parameter does not know its module

    wanted = {id(parameter) for parameter in parameters}
    modules = [module for module in list(_module_state_mapping) if isinstance(module, fsdp.FSDPModule)]
    return [module for module in modules if any(id(parameter) in wanted for parameter in module.parameters())]


def _reshard(modules: Iterable[Any]) -> None:
    for module in modules:
        module.reshard()
