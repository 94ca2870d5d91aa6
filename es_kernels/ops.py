"""The public operation. Every op schema, its fake and its registration stand on this one screen; the work is in
backends/."""

from __future__ import annotations

import math
import operator
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, SupportsFloat, SupportsIndex, TypeAlias, TypeVar, overload

import numpy as np
import torch

from . import backends, noise
from .layout import Layout, Pack, shared_memory
from .low_rank import MAX_RANK, FactorLayout, Matrices, views
from .segment import DTYPES, check_tensor
from .table import Entries, NamedTensor, ParamTable, distinct, match, named_tensors

Seeds: TypeAlias = SupportsIndex | Iterable[SupportsIndex] | torch.Tensor
Coefs: TypeAlias = SupportsFloat | Iterable[SupportsFloat] | torch.Tensor
_Tensor = TypeVar("_Tensor", bound=torch.Tensor)
_Named = TypeVar("_Named", bound="ParamTable | Mapping[str, torch.Tensor]")

_F32_MAX = 3.4028235677973366e38  # from here on a Python float rounds to an infinite float32

# ---- the ops ----
# Seeds (int64: the bit pattern of the u64) and coefs (f32) are tensors, on the CPU for Python numbers or on the device;
# no rounding_seed means to nearest. `layout` is Layout.key: names, streams, segments. No base: in place.

_library: Any = torch.library.Library("es_kernels", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    "add_noise_(Tensor(a!)[] out, Tensor[] base, Tensor[] anchor, Tensor seeds, Tensor coefs, Tensor? rounding_seed, "
    "float decay, int layout, int noise_rank) -> ()"
)
_library.define("fingerprint(Tensor[] tensors, int layout) -> Tensor")
_library.define("factors(Tensor seeds, ScalarType dtype, Device device, int layout) -> Tensor")


def _add_noise_(
    out: Sequence[torch.Tensor],
    base: Sequence[torch.Tensor],
    anchor: Sequence[torch.Tensor],
    seeds: torch.Tensor,
    coefs: torch.Tensor,
    rounding_seed: torch.Tensor | None,
    decay: float,
    layout: int,
    noise_rank: int,
) -> None:
    pack = Layout.find(layout).pack(out, base, anchor, noise_rank > 0)
    _write(pack, out, seeds, coefs, rounding_seed, decay, noise_rank)


def _write(
    pack: Pack,
    out: Sequence[torch.Tensor],
    seeds: torch.Tensor,
    coefs: torch.Tensor,
    rounding_seed: torch.Tensor | None,
    decay: float,
    noise_rank: int,
) -> None:
    """The op, on the Pack of its tensors."""
    decay = float(np.float32(decay))  # the contract casts first, and looks at the cast value
    for what, t in (("seeds", seeds), ("coefs", coefs), ("rounding_seed", rounding_seed)):
        if t is not None and not t.is_cpu and t.device != pack.device:
            raise ValueError(
                f"{what} are on {t.device}, but the tensors on {pack.device}: move them there, or to the CPU"
            )
    if coefs.is_cpu and not all(map(math.isfinite, coefs.tolist())):
        # On the device they are not looked at: that would wait for it
        raise ValueError(f"coefs {coefs.tolist()} are not all finite")
    if pack.units:
        backends.choose(pack.device).add_noise_(pack, seeds, coefs, rounding_seed, decay, noise_rank)
    torch.autograd.graph.increment_version(out)  # Library.impl does not know that `out` was written; autograd must


def _fingerprint(tensors: Sequence[torch.Tensor], layout: int) -> torch.Tensor:
    return _hash(Layout.find(layout).pack(tensors))


def _factors(seeds: torch.Tensor, dtype: torch.dtype, device: torch.device, layout: int) -> torch.Tensor:
    where = FactorLayout.find(layout)
    out = torch.zeros(where.elements * seeds.numel(), dtype=dtype, device=device)  # some lie between the factors
    if not seeds.is_cpu and seeds.device != out.device:
        raise ValueError(
            f"seeds are on {seeds.device}, but the factors on {out.device}: move them there, or to the CPU"
        )
    if out.numel():
        backends.choose(out.device).factors(where, out, seeds)
    return out


def _hash(pack: Pack) -> torch.Tensor:
    return (
        backends.choose(pack.device).fingerprint(pack)
        if pack.units
        else torch.zeros((), dtype=torch.int64, device="cpu")
    )


_library.impl("add_noise_", _add_noise_, "CompositeExplicitAutograd")
_library.impl("fingerprint", _fingerprint, "CompositeExplicitAutograd")
_library.impl("factors", _factors, "CompositeExplicitAutograd")
torch.library.register_fake("es_kernels::add_noise_", lambda *args: None, lib=_library)
torch.library.register_fake(
    "es_kernels::fingerprint",
    lambda tensors, layout: torch.empty((), dtype=torch.int64, device=tensors[0].device if tensors else "cpu"),
    lib=_library,
)
torch.library.register_fake(
    "es_kernels::factors",
    lambda seeds, dtype, device, layout: torch.empty(
        FactorLayout.find(layout).elements * seeds.numel(), dtype=dtype, device=device
    ),
    lib=_library,
)

# ---- the functions ----


@overload
def add_noise_(
    out: _Tensor,
    seeds: Seeds,
    coefs: Coefs,
    base: torch.Tensor | None = None,
    *,
    name: str | None = None,
    stream: int | None = None,
    decay: float = 0.0,
    anchor: torch.Tensor | None = None,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    rounding_seed: Seeds | None = None,
    noise_rank: int = 0,
) -> _Tensor: ...
@overload
def add_noise_(
    out: _Named,
    seeds: Seeds,
    coefs: Coefs,
    base: ParamTable | Entries | None = None,
    *,
    decay: float = 0.0,
    anchor: ParamTable | Entries | None = None,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    rounding_seed: Seeds | None = None,
    noise_rank: int = 0,
) -> _Named: ...
@overload
def add_noise_(
    out: Iterable[tuple[str, torch.Tensor] | NamedTensor],
    seeds: Seeds,
    coefs: Coefs,
    base: ParamTable | Entries | None = None,
    *,
    decay: float = 0.0,
    anchor: ParamTable | Entries | None = None,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    rounding_seed: Seeds | None = None,
    noise_rank: int = 0,
) -> list[tuple[str, torch.Tensor] | NamedTensor]: ...
def add_noise_(
    out: torch.Tensor | ParamTable | Entries,
    seeds: Seeds,
    coefs: Coefs,
    base: torch.Tensor | ParamTable | Entries | None = None,
    *,
    name: str | None = None,
    stream: int | None = None,
    decay: float = 0.0,
    anchor: torch.Tensor | ParamTable | Entries | None = None,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    rounding_seed: Seeds | None = None,
    noise_rank: int = 0,
) -> torch.Tensor | ParamTable | Entries:
    """out <- round(base + sum_i coefs[i] * noise(seeds[i])), in one pass over memory, for one tensor or a whole model.

        Perturb:  add_noise_(live, seed, sigma, base=master)         Swap: add_noise_(live, [old, new], [-sigma, sigma])
        Update:   add_noise_(master, seeds, (lr / N * z).tolist())   Restore: add_noise_(live, [], [], base=master)

    Element i (row-major) of the tensor named s gets noise(seed, stream_id(s), i) ~ N(0, 1): a function of these three
    integers alone, the same to the bit on every device and backend. NOISE.md fixes the order of operations, all in
    float32.

    Args:
        out: A tensor with `name` (or `stream`), a `ParamTable`, a mapping name -> tensor, or an iterable of
            (name, tensor) or NamedTensor. float32, bfloat16 or float16, mixed freely, all on one device.
        seeds: An int or a sequence of N ints of 64 bits, or an int64 tensor [N] (their bit pattern) on the CPU or on
            the device.
        coefs: A float or a sequence of N floats, or a float32 tensor [N] on the CPU or on the device. Python numbers
            are cast to float32 and must be finite.
        base: The weights to add to, in the form of `out`: the same names and shapes, any of the dtypes, in memory of
            its own (p.clone(); p.float() of a float32 p is p itself). None: `out` itself.
        name: Name of a bare tensor, which says what its noise is.
        stream: In place of `name` its stream, a u64.
        decay: First base <- base - decay * (base - anchor), in one fma.
        anchor: What decay moves towards, in the form of `out`. None: 0.
        rounding: To the dtype of `out`: "nearest" (even) or "stochastic" (unbiased).
        rounding_seed: For "stochastic", fresh for every call: an int of 64 bits, or an int64 tensor [] or [1].
        noise_rank: 0: the noise above. 1 to 64: of a matrix it is L R^T / sqrt(noise_rank), of which `factors` gives L
            and R, every element still of mean 0 and variance 1. A matrix is a tensor of two dimensions, or what a
            Segment's `width` says; all others draw the noise above in the same call.

    Returns:
        `out`; of an iterable of pairs, a list of them.

    Raises:
        TypeError: A type or dtype is not supported. Nothing was written.
        ValueError: Names, shapes, devices or numbers do not fit, or memory overlaps. Nothing was written.
        RuntimeError: A tensor requires grad outside torch.no_grad(), the memory of a table moved, no backend serves
            the device, or a launch failed, in CUDA's words.
    """
    seeds, coefs, rounding_seed, decay = _numbers(seeds, coefs, rounding, rounding_seed, decay)
    noise_rank = _rank(noise_rank, least=0)
    if (
        isinstance(out, ParamTable)
        and (base is None or isinstance(base, ParamTable))
        and (anchor is None or isinstance(anchor, ParamTable))
        and _direct(out, base, anchor)
    ):
        if name is not None or stream is not None:
            raise ValueError(_NAMES_ITSELF)
        pack = out.pack(base, anchor, noise_rank > 0)
        if torch.is_grad_enabled() and _any_requires_grad(*out.tensors):
            _refuse_gradients(out.names, out.tensors)
        _write(pack, out.tensors, seeds, coefs, rounding_seed, decay, noise_rank)
        return out
    if isinstance(out, torch.Tensor):
        if (name is None) == (stream is None):
            raise ValueError(
                "a bare tensor needs name= or stream= (one of them): it says which noise is this tensor's own"
            )
        layout = _layout_key((name or "<tensor>",), None if stream is None else (noise.u64(stream),))
        tensors = [out]
        names = [name or "<tensor>"]
    else:
        if name is not None or stream is not None:
            raise ValueError(_NAMES_ITSELF)
        out = out if isinstance(out, (ParamTable, Mapping)) else named_tensors(out)
        tensors, names, layout = _tensors_and_layout(out)
    bases = _match("base", base, out, names)
    anchors = _match("anchor", anchor, out, names)
    if not torch.compiler.is_compiling():
        # Here, because the dispatcher would run the fake kernel, or a copy, and silently write nothing.
        for role, supplied in (("out", tensors), ("base", bases), ("anchor", anchors)):
            for n, t in zip(names, supplied, strict=False):  # none of them where there is no base or anchor
                if t.is_meta or (role == "out" and t.is_neg()):
                    check_tensor(n, role, t)
    else:
        # A graph writes a copy of out and would hide it; without addresses only the same tensor can be seen. No zip: in
        # a graph torch 2.7 refuses one of lists that differ in length.
        for role, supplied in (("base", bases), ("anchor", anchors)):
            for i, source in enumerate(supplied):
                if source is tensors[i]:
                    raise ValueError(shared_memory(role, names[i], names[i]))
    if torch.is_grad_enabled():
        _refuse_gradients(names, tensors)
    torch.ops.es_kernels.add_noise_(tensors, bases, anchors, seeds, coefs, rounding_seed, decay, layout, noise_rank)
    return out


def fingerprint(named: ParamTable | Entries) -> int:
    """64 bits of all elements, dtypes, names and indices: a sum, so any order and any sharding give the same value.
    NOISE.md has the formula.

    Args:
        named: A `ParamTable`, a mapping name -> tensor, or an iterable of (name, tensor) or NamedTensor.

    Returns:
        A u64. Waits for the device.

    Raises:
        TypeError, ValueError: As `ParamTable` does.
        RuntimeError: The memory of a table moved, no backend serves the device, or a launch failed.
    """
    if isinstance(named, ParamTable) and _direct(named):
        value = _hash(named.pack())
    else:
        tensors, _, layout = _tensors_and_layout(named)
        value = torch.ops.es_kernels.fingerprint(tensors, layout)
    return int(value.item()) & 0xFFFFFFFFFFFFFFFF


def factors(
    matrices: Mapping[str, tuple[int, int]],
    seeds: Seeds,
    noise_rank: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The factors of the noise of low rank that `add_noise_` draws, in one launch: E = L R^T / sqrt(noise_rank).

    Args:
        matrices: Name -> (rows m, columns n) of whole matrices, as in the checkpoint.
        seeds: An int or a sequence of N ints of 64 bits, or an int64 tensor [N] (their bit pattern) on the CPU or on
            the device.
        noise_rank: 1 to 64.
        dtype: float32, bfloat16 or float16, to which the factors are rounded to nearest even.
        device: Where they are made.

    Returns:
        Name -> (L [N, m, noise_rank], R [N, n, noise_rank]), views of one new tensor.

    Raises:
        TypeError: A type or dtype is not supported.
        ValueError: A number does not fit, or the seeds are on another device.
        RuntimeError: No backend serves the device, or a launch failed.
    """
    seeds, noise_rank = _seeds(seeds, "seeds"), _rank(noise_rank, least=1)
    if dtype not in DTYPES:
        raise TypeError(f"factors are float32, bfloat16 or float16, not {dtype}")
    shapes = tuple((name, *shape) for name, shape in matrices.items())
    flat = torch.ops.es_kernels.factors(seeds, dtype, torch.device(device), _factors_key(shapes, noise_rank))
    return views(flat, shapes, noise_rank, seeds.shape[0])


# The dispatcher takes 170 ns a tensor, for tensors that a table knows already. Eager calls on tables go around it,
# unless somebody wants to see the op pass: a tensor subclass, a mode, a transform or a trace (which are keys of the
# thread beyond these two), a profiler.
_UNSEEN = {torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect).raw_repr()}  # in inference mode
_UNSEEN |= {bits | torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView).raw_repr() for bits in _UNSEEN}


def _direct(*tables: ParamTable | None) -> bool:
    return (
        not torch.compiler.is_compiling()
        and all(table is None or table.plain for table in tables)
        and torch._C._dispatch_tls_local_include_set().raw_repr() in _UNSEEN
        and not torch._C._len_torch_function_stack()
        and not torch._C._autograd._profiler_enabled()
    )


_NAMES_ITSELF = "name= and stream= are for a bare tensor; this call names its tensors itself"
# In C: 14 ns each, not 65. torch 2.7 does not have it.
_any_requires_grad = getattr(
    torch._C, "_any_requires_grad", lambda *tensors: any(map(operator.attrgetter("requires_grad"), tensors))
)


def _refuse_gradients(names: Sequence[str], tensors: Sequence[torch.Tensor]) -> None:
    for n, t in zip(names, tensors, strict=True):
        if t.requires_grad:
            raise RuntimeError(f"{n!r} requires grad: write it under torch.no_grad()")


def _layout_key(names: tuple[str, ...], streams: tuple[int, ...] | None = None) -> int:
    return Layout.intern(names, streams).key


def _factors_key(matrices: Matrices, noise_rank: int) -> int:
    return FactorLayout.intern(matrices, noise_rank).key


# As torch.compiler.assume_constant_result does, which imports torch._dynamo: 1.3 s of every import
_layout_key._dynamo_marked_constant = _factors_key._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _tensors_and_layout(named: ParamTable | Entries) -> tuple[list[torch.Tensor], list[str], int]:
    if isinstance(named, ParamTable):
        if not torch.compiler.is_compiling():
            named.check_unmoved()
        return named.tensors, named.names, named.layout.key
    pairs = named_tensors(named)
    for pair in pairs:
        if not (isinstance(pair, tuple) and isinstance(pair[0], str)):
            raise TypeError(
                "a list of unnamed tensors would give them all the same noise: pass (name, tensor) pairs, a mapping or "
                "a ParamTable"
            )
    if not torch.compiler.is_compiling():
        names, tensors, layout, _ = distinct(pairs)
        return tensors, names, layout.key
    if any(len(pair) > 2 and pair[2] is not None for pair in pairs):
        raise TypeError("torch.compile sees segments only in a ParamTable: build one of them outside of the graph")
    return [pair[1] for pair in pairs], [pair[0] for pair in pairs], _layout_key(tuple(pair[0] for pair in pairs))


def _match(role: str, value: Any, out: Any, names: Sequence[str]) -> list[torch.Tensor]:
    """`value` (base or anchor) as a list of tensors in the order of `names`; [] for None."""
    if value is None:
        return []
    if isinstance(out, torch.Tensor) or isinstance(value, torch.Tensor):
        if not (isinstance(out, torch.Tensor) and isinstance(value, torch.Tensor)):
            raise TypeError(f"{role} must have the form of out: a tensor for a tensor, or the same names")
        return [value]
    if isinstance(value, ParamTable) and not torch.compiler.is_compiling():
        value.check_unmoved()
    tied = out.tied if isinstance(out, ParamTable) else [name for name, *_ in named_tensors(out)]
    return match(role, value, names, tied)


def _numbers(
    seeds: Seeds, coefs: Coefs, rounding: str, rounding_seed: Seeds | None, decay: SupportsFloat
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, float]:
    """The arguments that are no weights, checked: as tensors, and decay as a float."""
    seeds, coefs, decay = _seeds(seeds, "seeds"), _coefs(coefs), float(decay)
    if seeds.shape != coefs.shape:
        raise ValueError(f"{seeds.shape[0]} seeds but {coefs.shape[0]} coefs")
    if not -_F32_MAX < decay < _F32_MAX:
        raise ValueError(f"decay {decay} is not a finite float32")
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding is 'nearest' or 'stochastic', not {rounding!r}")
    if (rounding == "stochastic") != (rounding_seed is not None):
        raise ValueError(
            "rounding='stochastic' needs a rounding_seed, fresh for every call; rounding='nearest' takes none"
        )
    key = None
    if rounding_seed is not None:
        key = _seeds(rounding_seed, "rounding_seed")
        if key.shape != (1,):
            raise ValueError("rounding_seed is one number")
    for what, t in (("seeds", seeds), ("coefs", coefs), ("rounding_seed", key)):
        if t is not None and t.is_meta:  # the dispatcher would run the fake kernel
            raise ValueError(f"{what} are on the meta device")
    return seeds, coefs, key, decay


def _rank(noise_rank: SupportsIndex, least: int) -> int:
    """Checked: an int from `least` to MAX_RANK."""
    try:
        rank = operator.index(noise_rank)
    except TypeError:
        raise TypeError(f"noise_rank is an integer, not {noise_rank!r}") from None
    if not least <= rank <= MAX_RANK:
        zero = "0 (full noise) or " if least == 0 else ""
        raise ValueError(f"noise_rank is {zero}1 to {MAX_RANK}, not {rank}")
    return rank


_ORDER = ": the order is add_noise_(out, seeds, coefs)"


def _seeds(seeds: Seeds, what: str) -> torch.Tensor:
    if isinstance(seeds, torch.Tensor):
        if seeds.dtype != torch.int64 or seeds.dim() > 1:
            order = _ORDER if what == "seeds" and seeds.is_floating_point() else ""
            raise TypeError(
                f"{what} as a tensor is int64 (the bit pattern of the u64) of shape [N], not {seeds.dtype} "
                f"{tuple(seeds.shape)}{order}"
            )
        return seeds.reshape(-1)
    integers = [_integer(s, what) for s in (seeds if isinstance(seeds, (list, tuple)) else _listed(seeds))]
    for s in integers:
        if not -(1 << 63) <= s < 1 << 64:
            raise ValueError(f"{what}: {s} does not fit in 64 bits")
    return _on_host([s - (1 << 64) if s >= 1 << 63 else s for s in integers], torch.int64)


def _integer(seed: SupportsIndex, what: str) -> int:
    try:
        return operator.index(seed)
    except TypeError:
        order = _ORDER if what == "seeds" and isinstance(seed, (float, np.floating)) else ""
        raise TypeError(f"{what} are integers, and {seed!r} is a {type(seed).__name__}{order}") from None


def _coefs(coefs: Coefs) -> torch.Tensor:
    if isinstance(coefs, torch.Tensor):
        if coefs.dtype != torch.float32 or coefs.dim() > 1:
            raise TypeError(f"coefs as a tensor are float32 of shape [N], not {coefs.dtype} {tuple(coefs.shape)}")
        return coefs.reshape(-1)
    floats = [float(c) for c in (coefs if isinstance(coefs, (list, tuple)) else _listed(coefs))]
    for c in floats:
        if not -_F32_MAX < c < _F32_MAX:
            raise ValueError(f"coefficient {c} is not a finite float32")
    if any(0 < abs(c) < 2**-126 for c in floats):  # torch.set_flush_denormal(True) would make the cast give 0
        bits = [
            round(abs(c) * 2**149) if abs(c) < 2**-126 else struct.unpack("<I", struct.pack("<f", abs(c)))[0]
            for c in floats
        ]
        signed = [b - (1 << 31) if math.copysign(1, c) < 0 else b for b, c in zip(bits, floats, strict=True)]
        return _on_host(signed, torch.int32).view(torch.float32)
    return _on_host(floats, torch.float32)


def _on_host(numbers: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    if torch.compiler.is_compiling():
        return torch.tensor(numbers, dtype=dtype, device="cpu")
    return torch.from_numpy(np.array(numbers, _NUMPY[dtype]))  # 1.4 us instead of 4.5


_NUMPY: dict[torch.dtype, type[np.generic]] = {torch.int64: np.int64, torch.int32: np.int32, torch.float32: np.float32}


def _listed(value: Any) -> list[Any]:
    return list(value) if hasattr(value, "__iter__") else [value]
