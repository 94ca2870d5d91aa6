"""`ParamTable`, what a training loop keeps: named parameters, ready for the kernels."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from .layout import Layout, remembered
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
        return remembered(self._packs, key, lambda: self._make_pack(base, anchor))

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
        name, tensor, segments = (*entry, None)[:3]
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
