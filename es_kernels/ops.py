"""The public operation. Every op schema, its fake and its registration stand on this one screen; the work is in
backends/."""

from __future__ import annotations

import math
import operator
import struct
from collections.abc import Mapping

import numpy as np
import torch

from . import backends, noise
from .layout import Layout, shared_memory
from .segment import check_tensor
from .table import ParamTable, distinct, match, named_tensors

_F32_MAX = 3.4028235677973366e38  # from here on a Python float rounds to an infinite float32

# ---- the ops ----
# Seeds (int64: the bit pattern of the u64) and coefs (f32) are tensors, on the CPU for Python numbers or on the device;
# no rounding_seed means to nearest. `layout` is Layout.key: names, streams, segments. No base: in place.

_library = torch.library.Library("es_kernels", "DEF")
_library.define(
    "add_noise_(Tensor(a!)[] out, Tensor[] base, Tensor[] anchor, Tensor seeds, Tensor coefs, Tensor? rounding_seed, "
    "float decay, int layout) -> ()"
)
_library.define("fingerprint(Tensor[] tensors, int layout) -> Tensor")


def _add_noise_(out, base, anchor, seeds, coefs, rounding_seed, decay, layout):
    _write(Layout.find(layout).pack(out, base, anchor), out, seeds, coefs, rounding_seed, decay)


def _write(pack, out, seeds, coefs, rounding_seed, decay):
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
        backends.choose(pack.device).add_noise_(pack, seeds, coefs, rounding_seed, decay)
    torch.autograd.graph.increment_version(out)  # Library.impl does not know that `out` was written; autograd must


def _fingerprint(tensors, layout):
    return _hash(Layout.find(layout).pack(tensors))


def _hash(pack):
    return (
        backends.choose(pack.device).fingerprint(pack)
        if pack.units
        else torch.zeros((), dtype=torch.int64, device="cpu")
    )


_library.impl("add_noise_", _add_noise_, "CompositeExplicitAutograd")
_library.impl("fingerprint", _fingerprint, "CompositeExplicitAutograd")
torch.library.register_fake("es_kernels::add_noise_", lambda *args: None, lib=_library)
torch.library.register_fake(
    "es_kernels::fingerprint",
    lambda tensors, layout: torch.empty((), dtype=torch.int64, device=tensors[0].device if tensors else "cpu"),
    lib=_library,
)

# ---- the functions ----


def add_noise_(
    out,
    seeds,
    coefs,
    base=None,
    *,
    name=None,
    stream=None,
    decay=0.0,
    anchor=None,
    rounding="nearest",
    rounding_seed=None,
):
    """out <- round(base + sum_i coefs[i] * noise(seeds[i])), in one pass over memory, for one tensor or a whole model.
    Returns `out`.

    out: a tensor with `name=` (or `stream=`, its u64 id), a mapping name -> tensor, an iterable of (name, tensor), or a
    `ParamTable`.
        float32, bfloat16 or float16, mixed freely. Element i (row-major) of the tensor named s gets noise(seed,
        stream_id(s), i) ~ N(0, 1): a function of these three integers alone, the same to the bit on every device and
        backend.
    seeds: int or sequence of N ints of 64 bits, or an int64 tensor [N] (bit pattern) on the CPU or on the device.
    coefs: float or sequence of N floats, or a float32 tensor [N]. Python numbers are cast to float32 and must be
    finite. base: where the weights to add to come from, in out's form (same names; any of the dtypes, out's shapes), in
    memory of its own: p.clone(),
        for p.float() of a float32 p is p itself. None: `out` itself. No seeds and a base restore: add_noise_(live, [],
        [], master).
    decay, anchor: first base <- base - decay * (base - anchor), one fma; no anchor means 0, no decay no anchor. anchor
    is in out's form. rounding: "nearest" (even) or "stochastic" (unbiased), which needs `rounding_seed`, fresh for
    every call: int, or int64 tensor [] or [1].

    The order of operations, all in float32, is fixed by NOISE.md. Raises TypeError or ValueError, naming the tensor,
    before anything is written; RuntimeError if the memory of a table moved, or with CUDA's words if a launch failed.

    Perturb:  add_noise_(live, seed, sigma, base=master)             Swap: add_noise_(live, [old, new], [-sigma, sigma])
    Update:   add_noise_(master, seeds, (lr / N * z).tolist())
    """
    seeds, coefs, rounding_seed, decay = _numbers(seeds, coefs, rounding, rounding_seed, decay)
    if all(t is None or isinstance(t, ParamTable) for t in (base, anchor)) and _direct(out, base, anchor):
        if name is not None or stream is not None:
            raise ValueError(_NAMES_ITSELF)
        pack = out.pack(base, anchor)
        if torch.is_grad_enabled() and _any_requires_grad(*out.tensors):
            _refuse_gradients(out.names, out.tensors)
        _write(pack, out.tensors, seeds, coefs, rounding_seed, decay)
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
    base = _match("base", base, out, tensors, names)
    anchor = _match("anchor", anchor, out, tensors, names)
    if not torch.compiler.is_compiling():
        # Here, because the dispatcher would run the fake kernel, or a copy, and silently write nothing.
        for what, given in (("out", tensors), ("base", base), ("anchor", anchor)):
            for n, t in zip(names, given):
                if t.is_meta or (what == "out" and t.is_neg()):
                    check_tensor(n, what, t)
    else:
        # A graph writes a copy of out and would hide it; without addresses only the same tensor can be seen.
        for what, given in (("base", base), ("anchor", anchor)):
            for n, t, source in zip(names, tensors, given):
                if source is t:
                    raise ValueError(shared_memory(what, n, n))
    if torch.is_grad_enabled():
        _refuse_gradients(names, tensors)
    torch.ops.es_kernels.add_noise_(tensors, base, anchor, seeds, coefs, rounding_seed, decay, layout)
    return out


def fingerprint(named):
    """64 bits (int) of all elements, dtypes, names and indices of a ParamTable, a mapping or an iterable of (name,
    tensor) pairs: a sum, so any order and any sharding give the same value. NOISE.md has the formula."""
    if _direct(named):
        value = _hash(named.pack())
    else:
        tensors, _, layout = _tensors_and_layout(named)
        value = torch.ops.es_kernels.fingerprint(tensors, layout)
    return value.item() & 0xFFFFFFFFFFFFFFFF


# The dispatcher takes 170 ns a tensor, for tensors that a table knows already. Eager calls on tables go around it,
# unless somebody wants to see the op pass: a tensor subclass, a mode, a transform or a trace (which are keys of the
# thread beyond these two), a profiler.
_UNSEEN = {torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect).raw_repr()}  # in inference mode
_UNSEEN |= {bits | torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView).raw_repr() for bits in _UNSEEN}


def _direct(out, *others):
    return (
        not torch.compiler.is_compiling()
        and isinstance(out, ParamTable)
        and all(table is None or table.plain for table in (out, *others))
        and torch._C._dispatch_tls_local_include_set().raw_repr() in _UNSEEN
        and not torch._C._len_torch_function_stack()
        and not torch.autograd._profiler_enabled()
    )


_NAMES_ITSELF = "name= and stream= are for a bare tensor; this call names its tensors itself"
# In C: 14 ns each, not 65
_any_requires_grad = getattr(torch._C, "_any_requires_grad", lambda *tensors: any(t.requires_grad for t in tensors))


def _refuse_gradients(names, tensors):
    for n, t in zip(names, tensors):
        if t.requires_grad:
            raise RuntimeError(f"{n!r} requires grad: write it under torch.no_grad()")


def _layout_key(names, streams=None):
    return Layout.intern(names, streams).key


# As torch.compiler.assume_constant_result does, which imports torch._dynamo: 1.3 s of every import
_layout_key._dynamo_marked_constant = True


def _tensors_and_layout(named):
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
        entries, layout, _ = distinct(pairs)
        return [e.tensor for e in entries], [e.name for e in entries], layout.key
    return [t for _, t in pairs], [n for n, _ in pairs], _layout_key(tuple(n for n, _ in pairs))


def _match(what, value, out, tensors, names):
    """`value` (base or anchor) as a list of tensors in the order of `tensors`; [] for None."""
    if value is None:
        return []
    if isinstance(out, torch.Tensor) or isinstance(value, torch.Tensor):
        if not (isinstance(out, torch.Tensor) and isinstance(value, torch.Tensor)):
            raise TypeError(f"{what} must have the form of out: a tensor for a tensor, or the same names")
        return [value]
    if isinstance(value, ParamTable) and not torch.compiler.is_compiling():
        value.check_unmoved()
    return match(what, value, names, out.tied if isinstance(out, ParamTable) else [n for n, *_ in named_tensors(out)])


def _numbers(seeds, coefs, rounding, rounding_seed, decay):
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
    if rounding_seed is not None:
        rounding_seed = _seeds(rounding_seed, "rounding_seed")
        if rounding_seed.shape != (1,):
            raise ValueError("rounding_seed is one number")
    for what, t in (("seeds", seeds), ("coefs", coefs), ("rounding_seed", rounding_seed)):
        if t is not None and t.is_meta:  # the dispatcher would run the fake kernel
            raise ValueError(f"{what} are on the meta device")
    return seeds, coefs, rounding_seed, decay


_ORDER = ": the order is add_noise_(out, seeds, coefs)"


def _seeds(seeds, what):
    if isinstance(seeds, torch.Tensor):
        if seeds.dtype != torch.int64 or seeds.dim() > 1:
            order = _ORDER if what == "seeds" and seeds.is_floating_point() else ""
            raise TypeError(
                f"{what} as a tensor is int64 (the bit pattern of the u64) of shape [N], not {seeds.dtype} "
                f"{tuple(seeds.shape)}{order}"
            )
        return seeds.reshape(-1)
    seeds = [_integer(s, what) for s in (seeds if isinstance(seeds, (list, tuple)) else _listed(seeds))]
    for s in seeds:
        if not -(1 << 63) <= s < 1 << 64:
            raise ValueError(f"{what}: {s} does not fit in 64 bits")
    return _on_host([s - (1 << 64) if s >= 1 << 63 else s for s in seeds], torch.int64)


def _integer(seed, what):
    try:
        return operator.index(seed)
    except TypeError:
        order = _ORDER if what == "seeds" and isinstance(seed, (float, np.floating)) else ""
        raise TypeError(f"{what} are integers, and {seed!r} is a {type(seed).__name__}{order}") from None


def _coefs(coefs):
    if isinstance(coefs, torch.Tensor):
        if coefs.dtype != torch.float32 or coefs.dim() > 1:
            raise TypeError(f"coefs as a tensor are float32 of shape [N], not {coefs.dtype} {tuple(coefs.shape)}")
        return coefs.reshape(-1)
    coefs = [float(c) for c in (coefs if isinstance(coefs, (list, tuple)) else _listed(coefs))]
    for c in coefs:
        if not -_F32_MAX < c < _F32_MAX:
            raise ValueError(f"coefficient {c} is not a finite float32")
    if any(0 < abs(c) < 2**-126 for c in coefs):  # torch.set_flush_denormal(True) would make the cast give 0
        bits = [
            round(abs(c) * 2**149) if abs(c) < 2**-126 else struct.unpack("<I", struct.pack("<f", abs(c)))[0]
            for c in coefs
        ]
        return _on_host(
            [b - (1 << 31) if math.copysign(1, c) < 0 else b for b, c in zip(bits, coefs)], torch.int32
        ).view(torch.float32)
    return _on_host(coefs, torch.float32)


def _on_host(numbers, dtype):
    if torch.compiler.is_compiling():
        return torch.tensor(numbers, dtype=dtype, device="cpu")
    return torch.from_numpy(np.array(numbers, _NUMPY[dtype]))  # 1.4 us instead of 4.5


_NUMPY = {torch.int64: np.int64, torch.int32: np.int32, torch.float32: np.float32}


def _listed(value):
    return list(value) if hasattr(value, "__iter__") else [value]
