"""What a call works on: `Layout`, the part that knows no memory (names, streams, segments), and `Pack`, the part that
knows addresses, as the array of structs that the kernels read."""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeAlias

import numpy as np
import torch

from . import noise, streams
from .overlap import Range, find_overlap
from .segment import SIZES, Piece, Segment, check_tensor, pieces_of, reach, struct_array

Packs: TypeAlias = "OrderedDict[tuple[object, ...], Pack]"
_PACKS = 8  # that a layout, or a table, remembers
_ROLES = ("out", "base", "anchor")


class Layout:
    """Names and streams of a list of tensors, and their explicit segments. Interned: equal layouts are one object with
    one `key`, which is a hash of the content, so that a compiled graph may keep it as a constant.

    Attributes:
        key: 56 bits.
        names: One a tensor.
        streams: Their streams, u64.
        segments: Of each tensor None (all of it) or its Segments.
        pinned: The packs whose address a captured CUDA graph holds.
    """

    _known: ClassVar[dict[int, Layout]] = {}

    def __init__(
        self,
        key: int,
        names: tuple[str, ...],
        streams: tuple[int, ...],
        segments: tuple[Sequence[Segment] | None, ...],
    ) -> None:
        self.key, self.names, self.streams, self.segments = key, names, streams, segments
        self._packs: Packs = OrderedDict()
        self.pinned: list[Pack] = []

    @classmethod
    def intern(
        cls,
        names: tuple[str, ...],
        streams: tuple[int, ...] | None = None,
        segments: tuple[Sequence[Segment] | None, ...] | None = None,
    ) -> Layout:
        """The Layout of this content. `streams` default to the ids of the names."""
        streams = tuple(map(noise.stream_id, names)) if streams is None else streams
        segments = (None,) * len(names) if segments is None else segments
        digest = hashlib.blake2b(repr((names, streams, segments)).encode(), digest_size=7).digest()
        key = int.from_bytes(digest, "little")
        if key not in cls._known:
            cls._known[key] = cls(key, names, streams, segments)
        return cls._known[key]

    @classmethod
    def find(cls, key: int) -> Layout:
        """The Layout with this key. Raises RuntimeError if this process made none."""
        try:
            return cls._known[key]
        except KeyError:
            raise RuntimeError(
                "this process does not know the parameter layout of a graph that another one compiled: build its "
                "ParamTable first"
            ) from None

    def pack(
        self,
        out: Sequence[torch.Tensor],
        base: Sequence[torch.Tensor] = (),
        anchor: Sequence[torch.Tensor] = (),
        matrices: bool = False,
    ) -> Pack:
        """The Pack of these tensors: one of the last, if it was of the same memory, or a new one."""
        key: tuple[object, ...]
        try:
            key = tuple(
                (t.data_ptr(), t.dtype, t.device, t.shape, t.stride()) for t in itertools.chain(out, base, anchor)
            ) + (len(base), len(anchor), matrices)
            # An address that was pinned may be given to memory that is not.
            key += tuple(_is_pinned(t) for t in itertools.chain(base, anchor) if t.device != out[0].device)
        except (RuntimeError, NotImplementedError):  # a tensor without strides or memory, such as a sparse one
            return Pack(self, out, base, anchor, matrices)  # says which
        return remembered(self._packs, key, lambda: Pack(self, out, base, anchor, matrices))


class Pack:
    """The segments of one call, with addresses. Its construction checks every tensor and raises before anything is
    written.

    Args:
        layout: Names, streams and segments of the tensors.
        out: The tensors that are written, one a name, all on one device.
        base: What is added to, one a name, or empty for `out`. In place of CUDA memory it may be pinned host memory.
        anchor: What decay moves towards, one a name, or empty.
        matrices: Whether the noise is of low rank: matrices are then cut into rectangles.

    Attributes:
        segments: Array of segment.SEGMENT.
        device: Of `out`.

    Raises:
        TypeError: A tensor is not strided, or of a dtype that is not supported.
        ValueError: Tensors are missing, on another device, without memory, of another shape than out, or overlap.
    """

    def __init__(
        self,
        layout: Layout,
        out: Sequence[torch.Tensor],
        base: Sequence[torch.Tensor],
        anchor: Sequence[torch.Tensor],
        matrices: bool = False,
    ) -> None:
        self.layout = layout
        self.device = out[0].device if out else torch.device("cpu")
        for role, tensors in zip(_ROLES, (out, base, anchor), strict=True):
            for name, tensor in zip(layout.names, tensors, strict=False):
                check_tensor(name, role, tensor)
            if len(tensors) != len(layout.names) and (tensors or role == "out"):
                raise ValueError(f"{role} has {len(tensors)} tensors for {len(layout.names)} names")
        for role, tensors in zip(_ROLES, (out, base, anchor), strict=True):
            for name, tensor, target in zip(layout.names, tensors, out, strict=False):
                self._check_memory(name, role, tensor, target)
        pieces: list[Piece] = []
        for i, (name, stream, segments) in enumerate(zip(layout.names, layout.streams, layout.segments, strict=True)):
            pieces += pieces_of(
                name, stream, segments, out[i], base[i] if base else None, anchor[i] if anchor else None, matrices
            )
        _check_indices(pieces)
        _check_addresses(pieces, bool(base), bool(anchor))
        self.segments = struct_array(pieces)
        self._on_device: torch.Tensor | None = None
        self._readers: set[int | None] = set()

    def _check_memory(self, name: str, role: str, tensor: torch.Tensor, out: torch.Tensor) -> None:
        """Refuses a tensor in the wrong place, without memory or of another shape than out."""
        if tensor.device != self.device and not (role != "out" and _is_pinned(tensor) and self.device.type == "cuda"):
            first = self.layout.names[0]
            raise ValueError(
                f"{name!r}: {role} is on {tensor.device}, but {first!r} is on {self.device}: move it there"
            )
        end = (tensor.storage_offset() + reach(tensor)) * tensor.element_size()
        if tensor.numel() and tensor.untyped_storage().nbytes() < end:
            raise ValueError(f"{name!r}: {role} has no memory: its storage was freed")
        if tensor.shape != out.shape:
            raise ValueError(f"{name!r}: {role} has shape {tuple(tensor.shape)}, but out has {tuple(out.shape)}")

    @property
    def units(self) -> int:
        """The work of all segments together, as csrc/es_kernels.h counts it."""
        return int(self.segments["unit_end"][-1]) if len(self.segments) else 0

    def on_device(self) -> torch.Tensor:
        """The segments as int64 words for a kernel on the device's current stream, the same for every backend: uploaded
        at the first use, kept for as long as a captured graph, or a kernel that is queued, may read them.

        Raises:
            RuntimeError: A CUDA graph is captured, and no call before uploaded them.
        """
        stream, capturing = streams.current(self.device)
        if self._on_device is None:
            if capturing:
                raise RuntimeError(
                    "make one call with these tensors before capturing a CUDA graph: the first one uploads the "
                    "parameter table"
                )
            # Waits for the copy: any stream may read it
            self._on_device = torch.from_numpy(self.segments.view(np.int64).copy()).to(self.device)
            self._readers = {None if stream is None else stream.cuda_stream}
        if stream and stream.cuda_stream not in self._readers:
            # Else the allocator gives an evicted table's memory away while this stream still reads it
            self._on_device.record_stream(stream)
            self._readers.add(stream.cuda_stream)
        if capturing and self not in self.layout.pinned:
            self.layout.pinned.append(self)
        return self._on_device


def remembered(packs: Packs, key: tuple[object, ...], make: Callable[[], Pack]) -> Pack:
    """packs[key], made if it is not there; the one that was not asked for the longest is forgotten."""
    pack = packs.pop(key, None)
    if pack is None:
        pack = make()
    packs[key] = pack
    if len(packs) > _PACKS:
        packs.popitem(last=False)
    return pack


def shared_memory(role: str, name: str, of_out: str) -> str:
    """The words for a base or anchor that lies in memory which the call writes."""
    whose = "out" if name == of_out else f"out's {of_out!r}"
    in_place = ", or leave base out to add in place" if role == "base" else ""
    return (
        f"{name!r}: {role} shares memory with {whose}: pass a copy, p.clone(){in_place} (p.float() of a float32 p is p "
        "itself)"
    )


def _is_pinned(tensor: torch.Tensor) -> bool:
    # What has no memory cannot be pinned.
    return tensor.device.type == "cpu" and (tensor.is_pinned() or not tensor.numel())


def _check_indices(pieces: Sequence[Piece]) -> None:
    """Refuses two pieces that would draw the same noise."""
    clash = find_overlap([Range(p.stream, p.first, p.rows, p.cols, p.index_stride) for p in pieces])
    if clash:
        a, b = (pieces[i].name for i in clash)
        raise ValueError(
            f"{a!r} and {b!r}: overlapping index ranges of one stream would draw the same noise; give them "
            "different names or ranges"
        )


def _check_addresses(pieces: Sequence[Piece], has_base: bool, has_anchor: bool) -> None:
    """Refuses memory that is written twice, or written and read as another's. Reading the same memory twice is fine."""
    owners, ranges = [], []
    for k, (role, is_there) in enumerate(zip(_ROLES, (True, has_base, has_anchor), strict=True)):
        for p in pieces if is_there else ():
            size = SIZES[p.dtypes[k]]
            owners.append((role, p.name))
            ranges.append(Range(0, p.addresses[k], p.rows, p.cols * size, p.strides[k] * size, role != "out"))
    clash = find_overlap(ranges)
    if clash:
        (role, name), (_, other) = sorted((owners[i] for i in clash), key=lambda owner: owner[0] == "out")
        if role == "out":
            raise ValueError(f"{name!r} and {other!r} overlap in memory: pass tensors that do not")
        raise ValueError(shared_memory(role, name, other))
