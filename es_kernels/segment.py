"""A tensor's memory as the kernels read it: segments, rows of consecutive elements that are a part of one stream."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from . import noise

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # ES_F32, ES_BF16, ES_F16 of csrc/es_kernels.h
SIZES = (4, 2, 2)  # bytes, by this number
# A strided tensor with more dimensions becomes one segment per outer index; past this many it is refused (they are
# compared for overlap pair by pair: 2048 take 10 s).
MAX_SEGMENTS_PER_TENSOR = 1024
TILE = 128  # rows and columns of a tile of a matrix: ES_TILE of csrc/es_kernels.h
UNITS_PER_TILE = TILE * TILE // 8
_MATRIX_LIMIT = 1 << 58  # rows and columns: times 64, the highest noise_rank, an index of a factor still has 64 bits

# EsSegment of csrc/es_kernels.h.
SEGMENT = np.dtype(
    [
        ("out", "u8"), ("base", "u8"), ("anchor", "u8"), ("rows", "i8"), ("cols", "i8"),
        ("out_stride", "i8"), ("base_stride", "i8"), ("anchor_stride", "i8"),
        ("first", "u8"), ("index_stride", "u8"), ("stream", "u8"), ("units_per_row", "i8"), ("unit_end", "i8"),
        ("out_dtype", "i4"), ("base_dtype", "i4"), ("anchor_dtype", "i4"), ("vector_path", "i4"), ("width", "i8"),
    ]
)  # fmt: skip


@dataclasses.dataclass(frozen=True, init=False)
class Segment:
    """A part of a tensor's memory that is a part of one stream: a shard, or the rows of q inside a fused qkv.

    Its element (row, col) is the element first + row * index_stride + col of the stream of `name`. In memory it lies
    offset + row * row_stride + col elements after `tensor.data_ptr()`.

    Args:
        name: Whose stream it draws from.
        rows: Number of rows.
        cols: Elements of a row, consecutive in memory and in the stream.
        offset: Elements in memory before its first one.
        row_stride: Elements from one row to the next in memory. None: `cols`.
        first: Index of its first element in the stream.
        index_stride: Indices from one row to the next in the stream. None: `cols`.
        width: Columns of the matrix that it is a part of, which noise of low rank goes by: index k is row k // width,
            column k % width. A row of the segment lies in one row of the matrix, or the segment is one run of
            consecutive indices. None: it is a part of no matrix, and draws full noise at every `noise_rank`.

    Raises:
        ValueError: A number is negative, the last index lies past 2^64 - 1, or the width does not fit the rest.
    """

    name: str
    rows: int
    cols: int
    offset: int
    row_stride: int
    first: int
    index_stride: int
    width: int | None

    def __init__(
        self,
        name: str,
        rows: int,
        cols: int,
        offset: int = 0,
        row_stride: int | None = None,
        first: int = 0,
        index_stride: int | None = None,
        width: int | None = None,
    ) -> None:
        row_stride = cols if row_stride is None else row_stride
        index_stride = cols if index_stride is None else index_stride
        vars(self).update(
            name=name,
            rows=rows,
            cols=cols,
            offset=offset,
            row_stride=row_stride,
            first=first,
            index_stride=index_stride,
            width=width,
        )
        if min(rows, cols, offset, row_stride, first, index_stride) < 0:
            raise ValueError(f"segment of {name!r}: negative size, stride or index in {self}")
        if rows * cols and first + (rows - 1) * index_stride + cols > 1 << 64:
            raise ValueError(f"segment of {name!r} ends past index 2^64")
        if width is not None:
            self._check_width(width)

    def _check_width(self, width: int) -> None:
        if width < 1:
            raise ValueError(f"segment of {self.name!r}: width {width} is no number of columns")
        last_row = (self.first + max(self.rows - 1, 0) * self.index_stride + self.cols) // width
        if max(width, last_row) > _MATRIX_LIMIT:
            raise ValueError(f"segment of {self.name!r}: a matrix has at most 2^58 rows and columns: {self}")
        in_rows = rows_fit(width, self.first, self.cols, self.index_stride if self.rows > 1 else 0)
        run = self.rows <= 1 or self.cols == self.row_stride == self.index_stride
        if not (in_rows or run):
            raise ValueError(
                f"segment of {self.name!r}: its rows are no parts of rows of a matrix of width {width}: index_stride "
                f"must be a multiple of the width, and first % width + cols at most the width, in {self}"
            )


def rows_fit(width: int | None, first: int, cols: int, index_stride: int) -> bool:
    """Whether rows of `cols` elements, the first from index `first` on and the others `index_stride` apart, each lie in
    one row of a matrix of `width` columns, all in the same columns of it. None, no matrix: they do."""
    return width is None or (index_stride % width == 0 and first % width + cols <= width)


class Piece(NamedTuple):
    """One EsSegment of csrc/es_kernels.h, but for unit_end, which depends on those before it. Addresses, strides and
    dtypes are of out, base and anchor: base is out where a call has none, anchor is 0."""

    name: str  # of the tensor, for messages
    addresses: tuple[int, ...]
    strides: tuple[int, ...]
    dtypes: tuple[int, ...]
    rows: int
    cols: int
    first: int
    index_stride: int
    stream: int
    units_per_row: int
    vector_path: bool
    width: int  # of the matrix whose noise is of low rank; 0: full noise

    @property
    def units(self) -> int:
        return (-(-self.rows // TILE) if self.width else self.rows) * self.units_per_row


def struct_array(pieces: Sequence[Piece]) -> npt.NDArray[np.void]:
    """The pieces as an array of SEGMENT, matrices first: their units begin at multiples of a tile's."""
    pieces = sorted(pieces, key=lambda p: p.width == 0)
    ends = itertools.accumulate(p.units for p in pieces)
    rows = [
        (
            *p.addresses, p.rows, p.cols, *p.strides, p.first, p.index_stride, p.stream, p.units_per_row, end,
            *p.dtypes, p.vector_path, p.width,
        )
        for p, end in zip(pieces, ends, strict=True)
    ]  # fmt: skip
    return np.array(rows, SEGMENT)


def pieces_of(
    name: str,
    stream: int,
    segments: Sequence[Segment] | None,
    out: torch.Tensor,
    base: torch.Tensor | None,
    anchor: torch.Tensor | None,
    matrices: bool = False,
) -> Iterator[Piece]:
    """The pieces of one tensor with its base and anchor, which have its shape.

    Args:
        name: Name of the tensor.
        stream: Its stream, where `segments` is None.
        segments: The parts of its memory. None: all of it, in row-major order.
        out: What is written.
        base: What is added to, or None for `out`.
        anchor: What decay moves towards, or None.
        matrices: For noise of low rank: matrices are cut into parts that are rectangles. Without `segments` a tensor
            of two dimensions is one.

    Raises:
        ValueError: The tensor is not contiguous in its last dimension, or needs more than MAX_SEGMENTS_PER_TENSOR; or
            one of `segments` reaches past it, or base or anchor has other strides.
    """
    group = [out, out if base is None else base, *(() if anchor is None else (anchor,))]
    for block in _whole(name, stream, group) if segments is None else _explicit(name, segments, group):
        if matrices and block.width:
            yield from _rectangles(name, block, group)
        else:
            yield from _cut(name, block, group)


def check_tensor(name: str, role: str, tensor: torch.Tensor) -> None:
    """Refuses by name what cannot be perturbed. Asks nothing of the memory.

    Args:
        name: Name of the tensor.
        role: "out", "base" or "anchor".
        tensor: The tensor.

    Raises:
        TypeError: Not strided, or not of one of DTYPES.
        ValueError: On the meta device, or lazily negated.
    """
    if tensor.layout != torch.strided:
        raise TypeError(
            f"{_label(name, role)} is a {tensor.layout} tensor: only dense, strided tensors can be perturbed"
        )
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"{_label(name, role)} has dtype {tensor.dtype}: only float32, bfloat16 and float16 are supported; leave "
            "it out of the table"
        )
    if tensor.device.type == "meta":
        raise ValueError(f"{_label(name, role)} is on the meta device and has no memory: materialise it first")
    if tensor.is_neg():
        raise ValueError(f"{_label(name, role)} is a lazily negated view: call .resolve_neg() first")


def _label(name: str, role: str) -> str:
    return f"{name!r}" if role == "out" else f"{name!r} ({role})"


def reach(tensor: torch.Tensor) -> int:
    """Elements from the first one in memory to the last."""
    if not tensor.numel():
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


class _Block(NamedTuple):
    """rows x cols elements: where they begin in each tensor of a group, and in the stream."""

    addresses: list[int]
    strides: list[int]
    rows: int
    cols: int
    first: int
    index_stride: int
    stream: int
    width: int  # of the matrix that it is a part of; 0: of none


def _explicit(name: str, segments: Sequence[Segment], group: list[torch.Tensor]) -> Iterator[_Block]:
    """The blocks that `segments` say."""
    for t in group[1:]:
        if t.stride() != group[0].stride():
            raise ValueError(
                f"{name!r}: with explicit segments base and anchor must have the strides of out, {group[0].stride()}, "
                f"not {t.stride()}"
            )
    elements = reach(group[0])
    for s in segments:
        if s.rows * s.cols == 0:
            continue
        if s.offset + (s.rows - 1) * s.row_stride + s.cols > elements:
            raise ValueError(f"{name!r}: {s} reaches past the {elements} elements of the tensor")
        addresses = [t.data_ptr() + s.offset * t.element_size() for t in group]
        strides = [s.row_stride] * len(group)
        yield _Block(addresses, strides, s.rows, s.cols, s.first, s.index_stride, noise.stream_id(s.name), s.width or 0)


def _whole(name: str, stream: int, group: list[torch.Tensor]) -> Iterator[_Block]:
    """Row-major index over the whole tensor: neighbouring dimensions that are contiguous in every tensor of the group
    are merged; the last becomes the columns, the one before it the rows, and each index of the others a block of its
    own."""
    shape = group[0].shape
    if group[0].numel() == 0:
        return
    dims: list[tuple[int, list[int]]] = []  # (size, strides), innermost last
    for i, size in enumerate(shape):
        strides = [t.stride(i) for t in group]
        if i == len(shape) - 1 and size == 1:
            strides = [1] * len(group)
        if dims and all(outer == size * inner for outer, inner in zip(dims[-1][1], strides, strict=True)):
            dims[-1] = (dims[-1][0] * size, strides)
        elif size != 1 or i == len(shape) - 1:
            dims.append((size, strides))
    if not dims:
        dims = [(1, [1] * len(group))]
    cols, strides = dims[-1]
    if any(s != 1 for s in strides):
        raise ValueError(
            f"{name!r} of shape {tuple(shape)} and strides {group[0].stride()} is not contiguous in its last "
            "dimension: pass a contiguous tensor, or its transposed parameter"
        )
    if len(dims) == 1:
        dims.insert(0, (1, [cols] * len(group)))
    rows, row_strides = dims[-2]
    outer_dims = dims[:-2]
    count = math.prod(size for size, _ in outer_dims)
    if count > MAX_SEGMENTS_PER_TENSOR:
        raise ValueError(
            f"{name!r} of shape {tuple(shape)} and strides {group[0].stride()} would need {count} segments: pass a "
            "contiguous tensor"
        )
    first = 0
    for index in itertools.product(*(range(size) for size, _ in outer_dims)):
        addresses = []
        for k, t in enumerate(group):
            offset = sum(i * strides[k] for i, (_, strides) in zip(index, outer_dims, strict=True))
            addresses.append(t.data_ptr() + offset * t.element_size())
        yield _Block(addresses, row_strides, rows, cols, first, cols, stream, shape[1] if len(shape) == 2 else 0)
        first += rows * cols


def _merged(block: _Block) -> _Block:
    """As one row, where the rows follow one another in memory and in the stream."""
    rows, cols = block.rows, block.cols
    if rows > 1 and block.index_stride == cols and all(s == cols for s in block.strides):
        rows, cols = 1, rows * cols
    if rows > 1:
        return block
    return block._replace(rows=1, cols=cols, strides=[cols] * len(block.strides), index_stride=cols)


def _cut(name: str, block: _Block, group: list[torch.Tensor]) -> Iterator[Piece]:
    """Cuts one row into head, body and tail, so that the body is whole aligned noise blocks, and where a block number
    crosses 2^32."""
    block = _merged(block)
    cuts = {0, block.cols}
    if block.rows == 1:
        head = min(-block.first % 8, block.cols)
        cuts |= {head, head + (block.cols - head) // 8 * 8}
        cuts.update(range((1 << 35) - block.first % (1 << 35), block.cols, 1 << 35))
    for start, stop in itertools.pairwise(sorted(cuts)):
        yield _piece(name, block, group, start, cols=stop - start)


def _rectangles(name: str, block: _Block, group: list[torch.Tensor]) -> Iterator[Piece]:
    """Cuts a run that crosses rows of the matrix into the end of a row, whole rows, and the beginning of one."""
    run, width = _merged(block), block.width
    if run.rows > 1:
        yield _piece(name, block, group, 0, width=width)
        return
    head = min(-run.first % width, run.cols)
    body = (run.cols - head) // width
    at = 0
    for rows, cols in ((1, head), (body, width), (1, run.cols - head - body * width)):
        if rows * cols:
            rectangle = run._replace(rows=rows, strides=[cols] * len(group), index_stride=cols)
            yield _piece(name, rectangle, group, at, cols, width)
            at += rows * cols


def _piece(
    name: str, block: _Block, group: list[torch.Tensor], start: int, cols: int | None = None, width: int = 0
) -> Piece:
    """The columns [start, start + cols) of a block; None: all of them."""
    rows, first, index_stride = block.rows, block.first + start, block.index_stride
    cols = block.cols if cols is None else cols
    sizes = [t.element_size() for t in group]
    at = [address + start * size for address, size in zip(block.addresses, sizes, strict=True)]
    aligned = first & 7 == 0 and cols % 8 == 0 and all(address % 16 == 0 for address in at)
    if rows > 1:
        aligned = aligned and index_stride % 8 == 0
        aligned = aligned and all(s * size % 16 == 0 for s, size in zip(block.strides, sizes, strict=True))
    if width:
        units = -(-cols // TILE) * UNITS_PER_TILE
    else:
        whole = rows == 1 or (first % 8 == 0 and index_stride % 8 == 0)
        units = (first % 8 + cols + 7) // 8 if whole else (cols + 14) // 8
    dtypes = (*(DTYPES[t.dtype] for t in group), 0)[:3]
    return Piece(
        name, (*at, 0)[:3], (*block.strides, 0)[:3], dtypes, rows, cols, first, index_stride, block.stream, units,
        aligned, width,
    )  # fmt: skip
