"""`ParamTable`, what a training loop keeps: named parameters, ready for the kernels."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, NoReturn, SupportsIndex, TypeAlias, TypeVar

import torch

from .layout import Layout, Pack, Packs, remembered
from .segment import Segment, check_tensor
from .watch import Watch


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


Entries: TypeAlias = Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor] | NamedTensor]
_Self = TypeVar("_Self", bound="ParamTable")


class ParamTable:
    """Named parameters, ready for the kernels: built once, used in every call.

    The table keeps the tensors, and what they are: address, dtype, shape, strides. If one is another (`p.data = ...`,
    `model.to(...)`), a call raises RuntimeError until `refresh()`. torch.utils.swap_tensors refuses tensors of a table,
    as it does all that somebody else holds (`model.to` too, after
    torch.__future__.set_swap_module_params_on_conversion(True)): delete the table first.

    Args:
        named: A mapping name -> tensor, or an iterable of (name, tensor) pairs, as model.named_parameters() gives them,
            or of NamedTensors. All tensors are on one device; float32, bfloat16 and float16 mix freely. A tensor that
            appears again under another name (tied weights) keeps its first name.

    Attributes:
        entries: The NamedTensors, one a tensor, in order.
        names: Their names.
        tensors: Their tensors.
        tied: Other name -> first name of the tensors that are tied.
        layout: Names, streams and segments, without the memory.
        plain: Whether no tensor is of a subclass, which might want to see the op.

    Raises:
        TypeError: An entry is no (name, tensor), a tensor is not strided, or its dtype is not supported.
        ValueError: A name is given twice, or tensors overlap, in memory or in the indices of a stream, are on several
            devices, or have no memory.
    """

    def __init__(self, named: ParamTable | Entries) -> None:
        self.names, self.tensors, self.layout, self.tied = distinct(named)
        self.entries = list(map(NamedTensor, self.names, self.tensors, self.layout.segments))
        self.plain = all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in self.tensors)
        self.layout.pack(self.tensors)  # every check now, not at the first call
        self.refresh()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """What copy, deepcopy and pickle ask for."""
        raise TypeError(
            "a ParamTable cannot be copied or pickled, since it knows its tensors by their memory: build one of the "
            "other tensors"
        )

    def refresh(self: _Self) -> _Self:
        """Accepts the tensors as they are now.

        Returns:
            The table.
        """
        self._watch = Watch(self.tensors)
        self._built = object()
        self._packs: Packs = OrderedDict()
        return self

    def check_unmoved(self) -> None:
        """Asks every tensor whether it still is where and what it was.

        Raises:
            RuntimeError: One is not. The error names it.
        """
        changed = self._changed()
        if changed is not None:
            name = self.names[changed]
            raise RuntimeError(
                f"{name!r} moved in memory, or changed its dtype or shape, since the table was built: call "
                "table.refresh()"
            )

    def _changed(self) -> int | None:
        return self._watch.first_changed()

    def pack(self, base: ParamTable | None = None, anchor: ParamTable | None = None, matrices: bool = False) -> Pack:
        """The Pack of this table, with these tables as base and anchor; `matrices` as Pack takes it. It asks of a
        tensor only what can change between two calls; names are matched once.

        Raises:
            RuntimeError: A tensor of one of the tables moved.
            ValueError: The tables have other names, devices or shapes, or their memory overlaps.
        """
        self.check_unmoved()
        for table in (base, anchor):
            if table is not None:
                table.check_unmoved()
        # Their `_built`, not the tables: what is remembered must keep nobody's weights alive.
        key = (matrices, *(None if table is None else table._built for table in (base, anchor)))
        return remembered(self._packs, key, lambda: self._make_pack(base, anchor, matrices))

    def _make_pack(self, base: ParamTable | None, anchor: ParamTable | None, matrices: bool) -> Pack:
        base_tensors, anchor_tensors = (
            [] if table is None else match(role, table, self.names, self.tied)
            for role, table in (("base", base), ("anchor", anchor))
        )
        return self.layout.pack(self.tensors, base_tensors, anchor_tensors, matrices)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return (
            f"ParamTable({len(self)} tensors, {sum(t.numel() for t in self.tensors)} elements, {len(self.tied)} tied)"
        )


def distinct(named: ParamTable | Entries) -> tuple[list[str], list[torch.Tensor], Layout, dict[str, str]]:
    """What a ParamTable is made of.

    Returns:
        Names and tensors, without those that are tied to an earlier one; their Layout; other name -> first name of the
        tied ones.

    Raises:
        TypeError: An entry is no (name, tensor).
        ValueError: A name is given twice.
    """
    tied = dict(named.tied) if isinstance(named, ParamTable) else {}
    first_names: dict[tuple[object, ...], str] = {}
    names: list[str] = []
    tensors: list[torch.Tensor] = []
    parts: list[tuple[Segment, ...] | None] = []
    for entry in named_tensors(named):
        if not (
            isinstance(entry, (tuple, list))
            and 2 <= len(entry) <= 3
            and isinstance(entry[0], str)
            and isinstance(entry[1], torch.Tensor)
        ):
            is_pair = isinstance(entry, (tuple, list)) and len(entry) == 2
            actual = f"({', '.join(type(e).__name__ for e in entry)})" if is_pair else type(entry).__name__
            raise TypeError(f"a ParamTable takes (name, tensor) pairs, such as model.named_parameters(), not {actual}")
        name, tensor, segments = (*entry, None)[:3]
        check_tensor(name, "out", tensor)
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and segments is None and place in first_names:
            tied[name] = first_names[place]
            continue
        first_names.setdefault(place, name)
        names.append(name)
        tensors.append(tensor)
        parts.append(None if segments is None else tuple(segments))
    if len(set(names)) < len(names):
        twice = min(name for name in names if names.count(name) > 1)
        raise ValueError(f"name {twice!r} is given twice, for different tensors")
    return names, tensors, Layout.intern(tuple(names), None, tuple(parts)), tied


def match(
    role: str, value: ParamTable | Entries, names: Sequence[str], tied: Collection[str] = ()
) -> list[torch.Tensor]:
    """The tensors of a base or anchor in the order of `names`.

    Args:
        role: "base" or "anchor".
        value: The base or anchor.
        names: The names of out.
        tied: Names that `value` may hold too.

    Raises:
        TypeError: `value` has no names.
        ValueError: A name of out is missing, or one is there that out does not have.
    """
    entries = named_tensors(value)
    if not all(isinstance(entry, tuple) and isinstance(entry[0], str) for entry in entries):
        raise TypeError(
            f"{role} must have the form of out: (name, tensor) pairs, a mapping or a ParamTable, not unnamed tensors"
        )
    supplied = {entry[0]: entry[1] for entry in entries}
    missing = [name for name in names if name not in supplied]
    known = {*names, *tied}
    extra = [name for name in supplied if name not in known]
    if missing or extra:
        raise ValueError(
            f"{role} must have the names of out: "
            + (f"{missing[0]!r} is missing" if missing else f"{extra[0]!r} is not in out")
        )
    return [supplied[name] for name in names]


def named_tensors(named: ParamTable | Entries) -> list[tuple[str, torch.Tensor] | NamedTensor]:
    """The entries of a mapping, an iterable or a ParamTable, which are not checked. Raises TypeError for a module."""
    if isinstance(named, ParamTable):
        return list(named.entries)
    if isinstance(named, torch.nn.Module):
        raise TypeError(f"a {type(named).__name__} is no named tensors: pass model.named_parameters()")
    return list(named.items() if isinstance(named, Mapping) else named)
