"""The operation in NumPy: what the others are compared with, and what runs where there is nothing else. Slow (100 to
200 ns a value and seed)."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from .. import noise
from ..layout import Pack
from ..low_rank import FactorLayout
from ..segment import DTYPES

Bits: TypeAlias = npt.NDArray[np.uint32] | npt.NDArray[np.uint16]
_CHUNK = 1 << 16  # elements at a time
_STORAGE = (np.uint32, np.uint16, np.uint16)


def unavailable(device: torch.device) -> str | None:
    return None if device.type in ("cpu", "cuda") else f"it serves CPU and CUDA tensors, not {device.type}"


def add_noise_(
    pack: Pack,
    seeds: torch.Tensor,
    coefs: torch.Tensor,
    rounding_seed: torch.Tensor | None,
    decay: float,
    noise_rank: int,
) -> None:
    with on_host(pack) as segments, ieee_denormals(), np.errstate(all="ignore"):
        members = list(zip((noise.u64(s) for s in seeds.tolist()), coefs.cpu().numpy(), strict=True))
        key = None if rounding_seed is None else noise.u64(int(rounding_seed))
        for s in segments:
            factors = [_factors(s, seed, coef, noise_rank) for seed, coef in members] if s["width"] else None
            for row, start, stop in _chunks(s):
                terms: Sequence[Iterable[_Term]]
                if factors is None:
                    terms = [_full(s, row, start, stop, seed, coef) for seed, coef in members]
                else:
                    terms = [zip(left[row], right[start:stop].T, strict=True) for left, right in factors]
                _add_noise_run(s, row, start, stop, terms, key, np.float32(decay))


_Term: TypeAlias = tuple[np.float32, noise.F32]  # a coefficient and what it is multiplied with


def _full(s: np.void, row: int, start: int, stop: int, seed: int, coef: np.float32) -> Iterator[_Term]:
    """The term of full noise of the elements [start, stop) of one row, drawn when it is asked for."""
    blocks, inside = _blocks(s, row, start, stop)
    yield coef, noise.normal_blocks(seed, int(s["stream"]), blocks).reshape(-1)[inside]


def _factors(s: np.void, seed: int, coef: np.float32, rank: int) -> tuple[noise.F32, noise.F32]:
    """c L [rows, rank] and R [cols, rank] of the rows and columns of a segment that is a part of a matrix."""
    first, width, stream = int(s["first"]), int(s["width"]), int(s["stream"])
    step = int(s["index_stride"]) // width
    left = noise.factor(seed, stream, noise.DOMAIN_LEFT, first // width, int(s["rows"]), rank, step)
    right = noise.factor(seed, stream, noise.DOMAIN_RIGHT, first % width, int(s["cols"]), rank)
    return (coef if rank == 1 else coef * noise.rank_scale(rank)) * left, right


def _blocks(s: np.void, row: int, start: int, stop: int) -> tuple[noise.U64, slice]:
    """The noise blocks of the elements [start, stop) of one row, and which of their values these are."""
    first = int(s["first"]) + row * int(s["index_stride"]) + start
    blocks = np.arange(first >> 3, ((first + stop - start - 1) >> 3) + 1, dtype=np.uint64)
    return blocks, slice(first & 7, (first & 7) + stop - start)


def _add_noise_run(
    s: np.void,
    row: int,
    start: int,
    stop: int,
    terms: Sequence[Iterable[_Term]],
    rounding_seed: int | None,
    decay: np.float32,
) -> None:
    """The contract, in its order, on the elements [start, stop) of one row: `terms` of every seed."""
    b = load(memory(s, "base", row, start, stop), s["base_dtype"])
    if decay:
        anchor = load(memory(s, "anchor", row, start, stop), s["anchor_dtype"]) if s["anchor"] else np.float32(0)
        b = noise.fma(-decay, b - anchor, b)
    if len(terms) > 1:
        acc = np.zeros_like(b)
        for coef, drawn in itertools.chain.from_iterable(terms[:-1]):
            acc = noise.fma(coef, drawn, acc)
        b = b + acc
    for coef, drawn in terms[-1] if terms else ():
        b = noise.fma(coef, drawn, b)
    thresholds = None
    if rounding_seed is not None:
        blocks, inside = _blocks(s, row, start, stop)
        thresholds = noise.rounding_thresholds(rounding_seed, int(s["stream"]), blocks).reshape(-1)[inside]
    memory(s, "out", row, start, stop)[:] = store(b, s["out_dtype"], thresholds)


def factors(layout: FactorLayout, out: torch.Tensor, seeds: torch.Tensor) -> None:
    dtype = DTYPES[out.dtype]
    for factor in layout.table:
        offset, count = seeds.numel() * int(factor["offset"]), int(factor["count"])
        for i, seed in enumerate(seeds.tolist()):
            index = np.arange(count, dtype=np.uint64)
            drawn = noise.normal(noise.u64(seed), int(factor["stream"]), index, int(factor["domain"]))
            stored = torch.from_numpy(store(drawn, dtype)).view(out.dtype)
            out[offset + i * count :][:count] = stored.to(out.device)


def fingerprint(pack: Pack) -> torch.Tensor:
    total = 0
    with on_host(pack) as segments, np.errstate(over="ignore"):
        for s in segments:
            for row, start, stop in _chunks(s):
                blocks, inside = _blocks(s, row, start, stop)
                add, multiply = (
                    k.reshape(-1)[inside] for k in _fingerprint_keys(int(s["out_dtype"]), int(s["stream"]), blocks)
                )
                bits = memory(s, "out", row, start, stop).astype(np.uint32)
                total += int(((bits + add).astype(np.uint64) * multiply).sum(dtype=np.uint64))
    total &= 0xFFFFFFFFFFFFFFFF
    return torch.tensor(total - (1 << 64) if total >> 63 else total, dtype=torch.int64, device="cpu")


def _fingerprint_keys(dtype: int, stream: int, blocks: noise.U64) -> tuple[noise.U32, noise.U64]:
    """What lane j of each block adds to its bits, and multiplies the sum with: u32 [blocks, 8] and u64 [blocks, 8]."""
    w = noise.words(dtype, stream, blocks, noise.DOMAIN_FINGERPRINT, rounds=7)
    add = np.concatenate([np.roll(w, -1, axis=-1), np.roll(w, -2, axis=-1)], axis=-1)
    multiply = np.concatenate([w, w << np.uint32(16) | w >> np.uint32(16)], axis=-1) | np.uint32(1)
    return add, multiply.astype(np.uint64)


# ---- storage formats, on their bits ----


def load(bits: Bits, dtype: int) -> noise.F32:
    """Stored bits (u32 or u16 array) -> float32, exact."""
    if dtype == 0:
        return bits.view(np.float32).copy()
    if dtype == 1:
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(np.float16).astype(np.float32)


def store(x: noise.F32, dtype: int, thresholds: noise.U32 | None = None) -> Bits:
    """float32 -> bits of the storage dtype: to nearest even, or stochastically with 16-bit `thresholds` (u32). Any NaN
    becomes the one NaN."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    nan = np.isnan(x)
    if dtype == 0:
        return np.where(nan, np.uint32(0x7FC00000), u)
    if dtype == 1:
        up = np.uint32(0x7FFF) + (u >> np.uint32(16) & np.uint32(1)) if thresholds is None else thresholds
        return np.where(nan, 0x7FC0, (u + up) >> np.uint32(16)).astype(np.uint16)
    if thresholds is None:
        return np.where(nan, 0x7E00, x.astype(np.float16).view(np.uint16)).astype(np.uint16)
    # The magnitude in units of the f16 ulp, 2^max(e - 10, -24), is n + f: up if floor(f 2^16) + r >= 2^16.
    magnitude = np.abs(np.where(np.isfinite(x), x, 0)).astype(np.float64)
    ulp = np.ldexp(1.0, np.maximum(np.frexp(magnitude)[1] - 1 - 10, -24))
    n = np.floor(magnitude / ulp)
    f = np.floor((magnitude / ulp - n) * 65536)
    rounded = (n + (f + thresholds >= 65536)) * ulp
    rounded = np.where(np.isinf(x), np.inf, np.where(rounded >= 65536, np.inf, rounded))
    return np.where(nan, 0x7E00, np.copysign(rounded, x).astype(np.float16).view(np.uint16)).astype(np.uint16)


# ---- memory ----


def memory(s: np.void, what: str, row: int, start: int, stop: int) -> npt.NDArray[Any]:
    """Elements [start, stop) of a row of `out`, `base` or `anchor`, as a writable array of their bits."""
    storage: np.dtype[Any] = np.dtype(_STORAGE[s[f"{what}_dtype"]])
    address = int(s[what]) + (row * int(s[f"{what}_stride"]) + start) * storage.itemsize
    buffer: Any = (ctypes.c_char * ((stop - start) * storage.itemsize)).from_address(address)
    return np.frombuffer(buffer, storage)


def _chunks(s: np.void) -> Iterator[tuple[int, int, int]]:
    for row in range(s["rows"]):
        for start in range(0, int(s["cols"]), _CHUNK):
            yield row, start, min(start + _CHUNK, int(s["cols"]))


@contextlib.contextmanager
def on_host(pack: Pack) -> Iterator[npt.NDArray[np.void]]:
    """The segments of `pack` with host addresses: of the tensors themselves, or, for CUDA tensors, of copies that are
    written back."""
    if pack.device.type == "cpu":
        yield pack.segments
        return
    segments, copies = pack.segments.copy(), []
    for what in ("out", "base", "anchor"):
        for s in segments:
            if s[what]:
                size = (4, 2, 2)[s[f"{what}_dtype"]]
                n_bytes = int((s["rows"] - 1) * s[f"{what}_stride"] + s["cols"]) * size
                device_view = _bytes_at(int(s[what]), n_bytes, pack.device)
                copies.append((what, device_view, device_view.cpu()))
                s[what] = copies[-1][2].data_ptr()
    yield segments
    for what, device_view, host in copies:
        if what == "out":
            device_view.copy_(host)


def _bytes_at(address: int, n_bytes: int, device: torch.device) -> torch.Tensor:
    class Array:
        __cuda_array_interface__ = {"shape": (n_bytes,), "typestr": "|u1", "data": (address, False), "version": 2}

    return torch.as_tensor(Array(), device=device)


@contextlib.contextmanager
def ieee_denormals() -> Iterator[None]:
    """NumPy computes in this thread, where torch.set_flush_denormal(True) flushes subnormals: lift that for a while."""
    flushing = np.float32(1e-40) * np.float32(1) == 0
    if flushing:
        torch.set_flush_denormal(False)
    try:
        yield
    finally:
        if flushing:
            torch.set_flush_denormal(True)
