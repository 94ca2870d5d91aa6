"""Named parameters -> segments: which memory draws which part of which stream.

`ParamTable` is what a training loop keeps; `Layout` its part that knows no memory (names, streams, segments); `Pack`
its part that knows addresses, as the array of structs that the kernels read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from . import noise, streams
from .watch import Watch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype of csrc/segments.h
_SIZES = (4, 2, 2)
_PACKS = 8  # that a layout, or a table, remembers
# A strided tensor with more dimensions becomes one segment per outer index; past this many it is refused (they are
# compared for overlap pair by pair: 2048 take 10 s).
MAX_SEGMENTS_PER_TENSOR = 1024

# struct Segment of csrc/segments.h.
SEGMENT = np.dtype(
    [
        ("out", "u8"),
        ("base", "u8"),
        ("anchor", "u8"),
        ("rows", "i8"),
        ("cols", "i8"),
        ("out_stride", "i8"),
        ("base_stride", "i8"),
    ]
    + [
        ("anchor_stride", "i8"),
        ("first", "u8"),
        ("index_stride", "u8"),
        ("stream", "u8"),
        ("units_per_row", "i8"),
        ("unit_end", "i8"),
    ]
    + [("out_dtype", "i4"), ("base_dtype", "i4"), ("anchor_dtype", "i4"), ("vector_path", "i4")]
)


@dataclasses.dataclass(frozen=True)
class Segment:
    """A part of a tensor's memory that is a part of one stream: a shard, or the rows of q inside a fused qkv.

    The rows x cols elements that start `offset` elements after `tensor.data_ptr()`, consecutive rows `row_stride`
    elements apart (default: cols), are the elements first + row * index_stride + col (default: cols) of the stream of
    `name`.
    """

    name: str
    rows: int
    cols: int
    offset: int = 0
    row_stride: int | None = None
    first: int = 0
    index_stride: int | None = None

    def __post_init__(self):
        for field in ("row_stride", "index_stride"):
            if getattr(self, field) is None:
                object.__setattr__(self, field, self.cols)
        if min(self.rows, self.cols, self.offset, self.row_stride, self.first, self.index_stride) < 0:
            raise ValueError(f"segment of {self.name!r}: negative size, stride or index in {self}")
        if self.rows * self.cols and self.first + (self.rows - 1) * self.index_stride + self.cols > 1 << 64:
            raise ValueError(f"segment of {self.name!r} ends past index 2^64")


class NamedTensor(NamedTuple):
    """A tensor and the name whose noise it draws, as a ParamTable takes it and as `ParamTable.entries` holds it.

    Attributes:
        name: Its stream is `noise.stream_id(name)`, unless `segments` name others.
        tensor: float32, bfloat16 or float16.
        segments: Which parts of which streams the parts of its memory are. None: the whole tensor, in row-major order,
            is the stream of `name`.
    """

    name: str
    tensor: torch.Tensor
    segments: Sequence[Segment] | None = None


class Layout:
    """Names and streams of a list of tensors, and their explicit segments. Interned: equal layouts are one object with
    one `key`, which is a hash of the content, so that a compiled graph may keep it as a constant."""

    _known: dict[int, Layout] = {}

    def __init__(self, key, names, streams, segments):
        self.key, self.names, self.streams, self.segments = key, names, streams, segments
        self._packs: OrderedDict = OrderedDict()
        self.pinned: list[Pack] = []  # packs whose address a captured CUDA graph holds

    @classmethod
    def intern(cls, names, streams=None, segments=None):
        """`streams` defaults to the ids of the names; `segments[i]` is None (all of the tensor) or a tuple of
        Segment."""
        streams = tuple(map(noise.stream_id, names)) if streams is None else streams
        segments = (None,) * len(names) if segments is None else segments
        digest = hashlib.blake2b(repr((names, streams, segments)).encode(), digest_size=7).digest()
        key = int.from_bytes(digest, "little")
        if key not in cls._known:
            cls._known[key] = cls(key, names, streams, segments)
        return cls._known[key]

    @classmethod
    def find(cls, key):
        try:
            return cls._known[key]
        except KeyError:
            raise RuntimeError(
                "this process does not know the parameter layout of a graph that another one compiled: build its "
                "ParamTable first"
            ) from None

    def pack(self, out, base=(), anchor=()):
        """The Pack of these tensors: checked, or found among the last that were."""
        try:
            key = tuple(
                (t.data_ptr(), t.dtype, t.device, t.shape, t.stride()) for t in itertools.chain(out, base, anchor)
            ) + (len(base), len(anchor))
            # An address that was pinned may be given to memory that is not.
            key += tuple(_is_pinned(t) for t in itertools.chain(base, anchor) if t.device != out[0].device)
        except (RuntimeError, NotImplementedError):  # a tensor without strides or memory, such as a sparse one
            return Pack(self, out, base, anchor)  # says which
        return _remembered(self._packs, key, lambda: Pack(self, out, base, anchor))


def _remembered(packs, key, make):
    """packs[key], made if it is not there; the one that was not asked for the longest is forgotten."""
    pack = packs.pop(key, None)
    if pack is None:
        pack = make()
    packs[key] = pack
    if len(packs) > _PACKS:
        packs.popitem(last=False)
    return pack


class Pack:
    """The segments of one call, with addresses: `segments`, an array of SEGMENT, and `device`. Its construction checks
    every tensor and raises before anything is written."""

    def __init__(self, layout, out, base, anchor):
        names = layout.names
        for what, tensors in (("out", out), ("base", base), ("anchor", anchor)):
            for name, tensor in zip(names, tensors):
                check_tensor(name, what, tensor)
            if tensors and len(tensors) != len(names):
                raise ValueError(f"{what} has {len(tensors)} tensors for {len(names)} names")
        self.layout = layout
        self.device = out[0].device if out else torch.device("cpu")
        for what, tensors in (("out", out), ("base", base), ("anchor", anchor)):
            for name, tensor, target in zip(names, tensors, out):
                if tensor.device != self.device and not (
                    what != "out" and _is_pinned(tensor) and self.device.type == "cuda"
                ):
                    raise ValueError(
                        f"{name!r}: {what} is on {tensor.device}, but {names[0]!r} is on {self.device}: move it there"
                    )
                if (
                    tensor.numel()
                    and tensor.untyped_storage().nbytes()
                    < (tensor.storage_offset() + _reach(tensor)) * tensor.element_size()
                ):
                    raise ValueError(f"{name!r}: {what} has no memory: its storage was freed")
                if tensor.shape != target.shape:
                    raise ValueError(
                        f"{name!r}: {what} has shape {tuple(tensor.shape)}, but out has {tuple(target.shape)}"
                    )
        rows = []
        self.owners = []  # name of each segment, for messages
        for i, name in enumerate(names):
            group = [tensors[i] for tensors in (out, base, anchor) if tensors]
            for segment in _segments(name, layout.streams[i], layout.segments[i], group):
                addresses, strides, n_rows, cols, first, index_stride, stream = segment
                sizes = [t.element_size() for t in group]
                for row in _pieces(addresses, sizes, strides, n_rows, cols, first, index_stride):
                    rows.append((*row, stream, *(DTYPES[t.dtype] for t in group)))
                    self.owners.append(name)
        self.segments = _struct_array(rows, bool(base), bool(anchor))
        self._check_overlap(bool(base), bool(anchor))
        self._on_device = None

    @property
    def units(self):
        return int(self.segments["unit_end"][-1]) if len(self.segments) else 0

    def on_device(self):
        """The segments as int64 words for a kernel on the device's current stream, the same for every backend: uploaded
        at the first use, kept for as long as a captured graph, or a kernel that is queued, may read them."""
        stream, capturing = streams.current(self.device)
        if self._on_device is None:
            if capturing:
                raise RuntimeError(
                    "make one call with these tensors before capturing a CUDA graph: the first one uploads the "
                    "parameter table"
                )
            # Waits for the copy: any stream may read it
            self._on_device = torch.from_numpy(self.segments.view(np.int64).copy()).to(self.device)
            self._readers = {stream and stream.cuda_stream}
        if stream and stream.cuda_stream not in self._readers:
            # Else the allocator gives an evicted table's memory away while this stream still reads it
            self._on_device.record_stream(stream)
            self._readers.add(stream.cuda_stream)
        if capturing and self not in self.layout.pinned:
            self.layout.pinned.append(self)
        return self._on_device

    def _check_overlap(self, has_base, has_anchor):
        s = self.segments
        indices = [
            (int(r["stream"]), int(r["first"]), int(r["rows"]), int(r["cols"]), int(r["index_stride"]), i)
            for i, r in enumerate(s)
        ]
        clash = _find_overlap(indices)
        if clash:
            a, b = (self.owners[i] for i in clash)
            raise ValueError(
                f"{a!r} and {b!r}: overlapping index ranges of one stream would draw the same noise; give them "
                "different names or ranges"
            )
        ranges = []
        for what in ["out"] + ["base"] * has_base + ["anchor"] * has_anchor:
            for i, r in enumerate(s):
                size = _SIZES[r[f"{what}_dtype"]]
                if r[what]:
                    ranges.append(
                        (
                            0,
                            int(r[what]),
                            int(r["rows"]),
                            int(r["cols"]) * size,
                            int(r[f"{what}_stride"]) * size,
                            (what, i),
                        )
                    )
        # Reading the same memory twice is fine: only ranges that are written, or written and read, must not meet.
        clash = _find_overlap(ranges, may_meet=lambda a, b: a[0] != "out" and b[0] != "out")
        if clash:
            (a, name_a), (b, name_b) = sorted(
                ((what, self.owners[i]) for what, i in clash), key=lambda c: c[0] == "out"
            )
            both = f"{name_a!r} and {name_b!r} overlap in memory: pass tensors that do not"
            raise ValueError(both if a == "out" else shared_memory(a, name_a, name_b))


class ParamTable:
    """Named parameters, ready for the kernels: built once, used in every call.

    named: a mapping name -> tensor, or an iterable of (name, tensor) pairs, as model.named_parameters() gives them, or
        of NamedTensors. A tensor that appears again under another name (tied weights) keeps its first name; `tied` maps
        the others to it. All tensors are on one device; float32, bfloat16 and float16 mix freely.
    entries: the NamedTensors, one a tensor, in order; `names` and `tensors` are their columns.

    The table keeps the tensors, and what they are: address, dtype, shape, strides. If one is another (`p.data = ...`,
    `model.to(...)`), a call raises RuntimeError until `refresh()`. torch.utils.swap_tensors refuses tensors of a table,
    as it does all that somebody else holds (`model.to` too, after
    torch.__future__.set_swap_module_params_on_conversion(True)): delete the table first.
    """

    def __init__(self, named):
        self.entries, self.layout, self.tied = distinct(named)
        self.names, self.tensors = [e.name for e in self.entries], [e.tensor for e in self.entries]
        # No subclass that wants to see the op
        self.plain = all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in self.tensors)
        self.layout.pack(self.tensors)  # every check now, not at the first call
        self.refresh()

    def __reduce_ex__(self, protocol):
        """What copy, deepcopy and pickle ask for."""
        raise TypeError(
            "a ParamTable cannot be copied or pickled, since it knows its tensors by their memory: build one of the "
            "other tensors"
        )

    def refresh(self):
        """Accept the tensors as they are now."""
        self._watch = Watch(self.tensors)
        self._built = object()
        self._packs = OrderedDict()
        return self

    def check_unmoved(self):
        """Raises RuntimeError if a tensor is not where and what it was when the table was built or refreshed."""
        changed = self._changed()
        if changed is not None:
            name = self.names[changed]
            raise RuntimeError(
                f"{name!r} moved in memory, or changed its dtype or shape, since the table was built: call "
                "table.refresh()"
            )

    def _changed(self):
        return self._watch.first_changed()

    def pack(self, base=None, anchor=None):
        """The Pack of this table, with these tables as base and anchor: of every tensor only what can change between
        two calls is looked at, names are matched once."""
        self.check_unmoved()
        for table in (base, anchor):
            if table is not None:
                table.check_unmoved()
        # Their `_built`, not the tables: what is remembered must keep nobody's weights alive.
        key = tuple(None if table is None else table._built for table in (base, anchor))
        return _remembered(self._packs, key, lambda: self._make_pack(base, anchor))

    def _make_pack(self, base, anchor):
        matched = (
            [] if t is None else match(what, t, self.names, self.tied)
            for what, t in (("base", base), ("anchor", anchor))
        )
        return self.layout.pack(self.tensors, *matched)

    def __len__(self):
        return len(self.names)

    def __repr__(self):
        return (
            f"ParamTable({len(self)} tensors, {sum(t.numel() for t in self.tensors)} elements, {len(self.tied)} tied)"
        )


def distinct(named) -> tuple[list[NamedTensor], Layout, dict[str, str]]:
    """(entries, their Layout, other name -> name of tied ones) of what a ParamTable takes."""
    tied, seen, entries = {}, {}, []
    for entry in named_tensors(named):
        if not (
            isinstance(entry, (tuple, list))
            and 2 <= len(entry) <= 3
            and isinstance(entry[0], str)
            and isinstance(entry[1], torch.Tensor)
        ):
            is_pair = isinstance(entry, (tuple, list)) and len(entry) == 2
            got = f"({', '.join(type(e).__name__ for e in entry)})" if is_pair else type(entry).__name__
            raise TypeError(f"a ParamTable takes (name, tensor) pairs, such as model.named_parameters(), not {got}")
        name, tensor, segments = NamedTensor(*entry)
        check_tensor(name, "out", tensor)
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and segments is None and place in seen:
            tied[name] = seen[place]
            continue
        seen.setdefault(place, name)
        entries.append(NamedTensor(name, tensor, None if segments is None else tuple(segments)))
    names = tuple(e.name for e in entries)
    if len(set(names)) < len(names):
        twice = min(name for name in names if names.count(name) > 1)
        raise ValueError(f"name {twice!r} is given twice, for different tensors")
    return entries, Layout.intern(names, None, tuple(e.segments for e in entries)), tied


def check_tensor(name, what, t):
    """Refuses what cannot be a parameter, by name. Memory is not looked at."""
    label = f"{name!r}" if what == "out" else f"{name!r} ({what})"
    if t.layout != torch.strided:
        raise TypeError(f"{label} is a {t.layout} tensor: only dense, strided tensors can be perturbed")
    if t.dtype not in DTYPES:
        raise TypeError(
            f"{label} has dtype {t.dtype}: only float32, bfloat16 and float16 are supported; leave it out of the table"
        )
    if t.device.type == "meta":
        raise ValueError(f"{label} is on the meta device and has no memory: materialise it first")
    if t.is_neg():
        raise ValueError(f"{label} is a lazily negated view: call .resolve_neg() first")


def shared_memory(what, name, of_out):
    """The words for a base or anchor that lies in memory which the call writes."""
    whose = "out" if name == of_out else f"out's {of_out!r}"
    in_place = ", or leave base out to add in place" if what == "base" else ""
    return f"{name!r}: {what} shares memory with {whose}: pass a copy, p.clone(){in_place} (p.float() of a float32 p is p itself)"


def _is_pinned(t):
    return t.device.type == "cpu" and (t.is_pinned() or not t.numel())  # no memory, which cannot be pinned


def _reach(t):
    """Elements from the first one in memory to the last."""
    return 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride())) if t.numel() else 0


def _segments(name, stream, explicit, group):
    """(addresses, row strides, rows, cols, first, index stride, stream) of one tensor and its base and anchor,
    `group`."""
    if explicit is None:
        yield from _whole(name, stream, group)
        return
    for t in group[1:]:
        if t.stride() != group[0].stride():
            raise ValueError(
                f"{name!r}: with explicit segments base and anchor must have the strides of out, {group[0].stride()}, "
                f"not {t.stride()}"
            )
    reach = _reach(group[0])
    for s in explicit:
        if s.rows * s.cols == 0:
            continue
        if s.offset + (s.rows - 1) * s.row_stride + s.cols > reach:
            raise ValueError(f"{name!r}: {s} reaches past the {reach} elements of the tensor")
        addresses = [t.data_ptr() + s.offset * t.element_size() for t in group]
        yield addresses, [s.row_stride] * len(group), s.rows, s.cols, s.first, s.index_stride, noise.stream_id(s.name)


def _whole(name, stream, group):
    """Row-major index over the whole tensor: neighbouring dimensions that are contiguous in every tensor of the group
    are merged; the last becomes the columns, the one before it the rows, and each index of the others a segment of its
    own."""
    shape = group[0].shape
    if group[0].numel() == 0:
        return
    dims = []  # (size, strides), innermost last
    for i, size in enumerate(shape):
        strides = [t.stride(i) for t in group]
        if i == len(shape) - 1 and size == 1:
            strides = [1] * len(group)
        if dims and all(outer == size * inner for outer, inner in zip(dims[-1][1], strides)):
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
    outer = dims[:-2]
    count = int(np.prod([size for size, _ in outer], dtype=np.int64))
    if count > MAX_SEGMENTS_PER_TENSOR:
        raise ValueError(
            f"{name!r} of shape {tuple(shape)} and strides {group[0].stride()} would need {count} segments: pass a "
            "contiguous tensor"
        )
    first = 0
    for index in itertools.product(*(range(size) for size, _ in outer)):
        offsets = [sum(i * strides[k] for i, (_, strides) in zip(index, outer)) for k in range(len(group))]
        addresses = [t.data_ptr() + o * t.element_size() for t, o in zip(group, offsets)]
        yield addresses, row_strides, rows, cols, first, cols, stream
        first += rows * cols


def _pieces(addresses, sizes, strides, rows, cols, first, index_stride):
    """Cuts one row into head, body and tail, so that the body is whole aligned blocks, and where a block number crosses
    2^32."""
    if rows > 1 and index_stride == cols and all(s == cols for s in strides):
        rows, cols = 1, rows * cols
    cuts = [0, cols]
    if rows == 1:
        strides, index_stride = [cols] * len(sizes), cols
        head = min(-first % 8, cols)
        cuts += [head, head + (cols - head) // 8 * 8]
        cuts += range((1 << 35) - first % (1 << 35), cols, 1 << 35)
    cuts = sorted(set(cuts))
    for start, stop in zip(cuts, cuts[1:]):
        n = stop - start
        at = [a + start * size for a, size in zip(addresses, sizes)]
        aligned = first + start & 7 == 0 and n % 8 == 0 and all(a % 16 == 0 for a in at)
        if rows > 1:
            aligned = aligned and index_stride % 8 == 0 and all(s * size % 16 == 0 for s, size in zip(strides, sizes))
        whole = rows == 1 or (first % 8 == 0 and index_stride % 8 == 0)
        units = ((first + start) % 8 + n + 7) // 8 if whole else (n + 14) // 8
        yield at, strides, rows, n if rows == 1 else cols, first + start, index_stride, units, aligned


def _struct_array(rows, has_base, has_anchor):
    s = np.zeros(len(rows), SEGMENT)
    where = ["out"] + ["base"] * has_base + ["anchor"] * has_anchor
    units = 0
    for i, (at, strides, n_rows, cols, first, index_stride, units_per_row, aligned, stream, *dtypes) in enumerate(rows):
        r = s[i]
        for what, address, stride, dtype in zip(where, at, strides, dtypes):
            r[what], r[f"{what}_stride"], r[f"{what}_dtype"] = address, stride, dtype
        if not has_base:
            r["base"], r["base_stride"], r["base_dtype"] = r["out"], r["out_stride"], r["out_dtype"]
        units += n_rows * units_per_row
        r["rows"], r["cols"], r["first"], r["index_stride"], r["stream"] = (
            n_rows,
            cols,
            first % (1 << 64),
            index_stride,
            stream,
        )
        r["units_per_row"], r["unit_end"], r["vector_path"] = units_per_row, units, aligned
    return s


def _find_overlap(ranges, may_meet=lambda a, b: False):
    """The first two owners whose ranges meet, or None. A range is (space, start, rows, length, stride, owner): `rows`
    intervals [start + k * stride, ... + length). A range whose own rows overlap meets itself."""
    active = []
    for r in sorted(ranges, key=lambda r: r[:2]):
        space, start, rows, length, stride, owner = r
        if rows > 1 and stride < length and not may_meet(owner, owner):
            return owner, owner
        active = [a for a in active if a[0] == space and a[1] + (a[2] - 1) * a[4] + a[3] > start]
        for a in active:
            if not may_meet(a[5], owner) and _meet(a, r):
                return a[5], owner
        active.append(r)
    return None


def _meet(a, b):
    """Whether two ranges share a place."""
    # Rows that lie on each other (stride 0, of an expanded tensor) are one row.
    a, b = ((*r[:2], r[2] if r[4] else 1, *r[3:]) for r in (a, b))
    (_, a0, a_rows, a_len, a_stride, _), (_, b0, b_rows, b_len, b_stride, _) = sorted((a, b), key=lambda r: r[2])
    lowest = 0
    if a_stride == b_stride:  # only the difference of the rows' numbers matters: one row of a against all differences
        lowest, a_rows = 1 - a_rows, 1
    for k in range(a_rows):
        start = a0 + k * a_stride - b0  # of this row of a, seen from b
        first = max(lowest, -(-(start - b_len + 1) // b_stride)) if b_rows > 1 else 0
        last = min(b_rows - 1, (start + a_len - 1) // b_stride) if b_rows > 1 else 0
        if first <= last and start < first * b_stride + b_len and start + a_len > first * b_stride:
            return True
    return False


def match(what, value, names, tied=()):
    """The tensors of `value` (base or anchor: named tensors in any form) in the order of `names`. It may hold `tied`
    names too."""
    entries = named_tensors(value)
    if not all(isinstance(entry, tuple) and isinstance(entry[0], str) for entry in entries):
        raise TypeError(
            f"{what} must have the form of out: (name, tensor) pairs, a mapping or a ParamTable, not unnamed tensors"
        )
    found = {entry[0]: entry[1] for entry in entries}
    missing = [n for n in names if n not in found]
    known = {*names, *tied}
    extra = [n for n in found if n not in known]
    if missing or extra:
        raise ValueError(
            f"{what} must have the names of out: "
            + (f"{missing[0]!r} is missing" if missing else f"{extra[0]!r} is not in out")
        )
    return [found[n] for n in names]


def named_tensors(named) -> Iterable[tuple[str, torch.Tensor]]:
    """(name, tensor) pairs of a mapping, an iterable of pairs, or a ParamTable."""
    if isinstance(named, ParamTable):
        return list(zip(named.names, named.tensors))
    if isinstance(named, torch.nn.Module):
        raise TypeError(f"a {type(named).__name__} is no named tensors: pass model.named_parameters()")
    return list(named.items() if isinstance(named, Mapping) else named)
