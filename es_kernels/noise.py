"""The noise, in NumPy: the definition that every other implementation equals, bit for bit.

`normal(seed, stream, index)` is a pure function of three 64-bit integers. NOISE.md says the same in words; csrc/noise.h
says it in C++, line by line the same. Everything here is integer arithmetic or a single IEEE 754 float32 operation, so
there is nothing that a device, a compiler or a math library could do differently.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

F32: TypeAlias = npt.NDArray[np.float32]
U32: TypeAlias = npt.NDArray[np.uint32]
U64: TypeAlias = npt.NDArray[np.uint64]

VERSION = 1

# Domains: what a Philox call is for. They occupy the three bits above the 61 bits of the block number.
DOMAIN_NOISE, DOMAIN_SEED, DOMAIN_FINGERPRINT, DOMAIN_LEFT, DOMAIN_ROUNDING, DOMAIN_RIGHT = range(6)
# Purposes of a member's seed words.
MEMBER_NOISE, MEMBER_ROUNDING, PROMPT_CHOICE, UPDATE_ROUNDING, SAMPLING = range(5)

_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)

# The polynomials of the transform, fitted by bench/noise/fit_noise.py to the distribution function itself, not to log,
# sqrt, sin and cos. -(log2(m) - (m - 1)), up to a factor, ascending powers of m
LOG = tuple(map(np.float32, (2.0364969, -3.5937726, 1.8323295, -0.27228412)))
LOG_SLOPE = np.float32(-2.1457672e-07)
RSQRT_SEED, RSQRT = 0x5EDBD221, np.float32(1.1556236)
COS = tuple(map(np.float32, (1.8363578, -3.3855894e-08, 1.03152155e-16, -9.48053e-26)))  # ascending powers of t^2
SIN = tuple(map(np.float32, (0.0003504429, -2.0631862e-12, 2.599999e-21)))

_SIGN64 = np.uint64(0x8000000000000000)


def u64(value: int) -> int:
    """`value` as an unsigned 64-bit integer.

    Args:
        value: Any Python int of 64 bits, signed or unsigned.

    Raises:
        ValueError: It does not fit in 64 bits.
    """
    if not -(1 << 63) <= value < 1 << 64:
        raise ValueError(f"{value} does not fit in 64 bits")
    return value & 0xFFFFFFFFFFFFFFFF


def stream_id(name: str) -> int:
    """The stream of a tensor: BLAKE2b-64 of its canonical name in UTF-8, read little-endian."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def philox4x32(counter: npt.ArrayLike, key: npt.ArrayLike, rounds: int = 10) -> U32:
    """Philox4x32 of Salmon et al. (SC 2011): u32 counter [..., 4], u32 key [..., 2] -> u32 [..., 4]."""
    c0, c1, c2, c3 = np.moveaxis(np.asarray(counter, np.uint32), -1, 0)
    k0, k1 = np.moveaxis(np.asarray(key, np.uint32), -1, 0)
    for i in range(rounds):
        p0 = c0.astype(np.uint64) * np.uint64(_PHILOX_M[0])
        p1 = c2.astype(np.uint64) * np.uint64(_PHILOX_M[1])
        # The key of round i is key + i * W, modulo 2^32 (in u64 first: NumPy warns when a u32 scalar wraps).
        r0 = (k0.astype(np.uint64) + np.uint64(i * _PHILOX_W[0])).astype(np.uint32)
        r1 = (k1.astype(np.uint64) + np.uint64(i * _PHILOX_W[1])).astype(np.uint32)
        c0, c1 = _high(p1) ^ c1 ^ r0, _low(p1)
        c2, c3 = _high(p0) ^ c3 ^ r1, _low(p0)
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1)


def words(seed: int, stream: int, block: npt.ArrayLike, domain: int, rounds: int = 10) -> U32:
    """The four random words of each noise block: u64 array block [...] -> u32 [..., 4]."""
    block = np.asarray(block, np.uint64)
    counter = np.empty((*block.shape, 4), np.uint32)
    counter[..., 0] = _low(block)
    counter[..., 1] = _high(block) | np.uint32(domain << 29)
    counter[..., 2] = stream & 0xFFFFFFFF
    counter[..., 3] = stream >> 32
    return philox4x32(counter, np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint32), rounds)


def member_seed(run_seed: int, generation: int, member: int, purpose: int = MEMBER_NOISE) -> int:
    """The seed of a population member. Counter-based, so a run has no hidden generator state.

    Args:
        run_seed: 64 bits, signed or unsigned.
        generation: Number of the generation, u32.
        member: Number of the member, u32.
        purpose: What the seed is for: MEMBER_NOISE, MEMBER_ROUNDING, PROMPT_CHOICE, UPDATE_ROUNDING or
            SAMPLING.

    Returns:
        A u64.

    Raises:
        ValueError: `run_seed` does not fit in 64 bits.
    """
    return member_seeds(run_seed, generation, [member], purpose)[0]


def member_seeds(run_seed: int, generation: int, members: Sequence[int], purpose: int = MEMBER_NOISE) -> list[int]:
    """`member_seed` of each of these members, at once: 4096 of them take 1 ms instead of 300.

    Args:
        run_seed: 64 bits, signed or unsigned.
        generation: Number of the generation, u32.
        members: Their numbers, u32.
        purpose: As for `member_seed`.

    Returns:
        A u64 for each.

    Raises:
        ValueError: `run_seed` does not fit in 64 bits.
    """
    counter = np.empty((len(members), 4), np.uint32)
    counter[:] = generation, DOMAIN_SEED << 29, 0, purpose
    counter[:, 2] = members
    run_seed = u64(run_seed)
    words = philox4x32(counter, np.array([run_seed & 0xFFFFFFFF, run_seed >> 32], np.uint32)).astype(np.uint64)
    seeds: list[int] = (words[:, 0] | words[:, 1] << np.uint64(32)).tolist()
    return seeds


def fma(a: npt.ArrayLike, b: npt.ArrayLike, c: npt.ArrayLike) -> F32:
    """float32 a * b + c with ONE rounding, as IEEE 754 defines it.

    NumPy has no fma. The product of two float32 is exact in float64; the sum is then rounded to odd there, which makes
    the last rounding, to float32, see on which side of a tie the exact value lies (Boldo & Melquiond 2008; 53 >= 2 * 24
    + 2 bits).
    """
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        p = np.asarray(a, np.float32).astype(np.float64) * np.asarray(b, np.float32).astype(np.float64)
        c = np.asarray(c, np.float32).astype(np.float64)
        s = p + c
        v = s - p
        error = (p - (s - v)) + (c - v)  # TwoSum: s + error == p + c exactly
        bits = np.atleast_1d(s).view(np.int64)
        error = np.atleast_1d(error)
        even_and_inexact = ((bits & 1) == 0) & (error != 0) & np.isfinite(error)
        # One step toward the exact value: away from zero if the error has the sign of s, else toward zero.
        step = np.where((error > 0) == (bits >= 0), 1, -1)
        bits = np.where(even_and_inexact, bits + step, bits)
        return bits.view(np.float64).astype(np.float32).reshape(np.shape(s))


def box_muller(w: npt.ArrayLike) -> tuple[F32, F32]:
    """One random word u32 [...] -> a pair of normals, f32 [...] each: (r cos, r sin).

    Bits 31..14 give the radius, 13..1 the angle over the half circle (an odd integer t in -8191..8191, times pi /
    16384), bit 0 the sign of the pair.
    """
    w = np.asarray(w, np.uint32)
    # u in (0, 1) as a float whose value is 2^32 u; its exponent and fraction, together one integer, are log2 u up to
    # 0.09.
    f = ((w & np.uint32(0xFFFFC000)) | np.uint32(0x2000)).astype(np.float32).view(np.uint32)
    log = (f - np.uint32(0x4F800000)).view(np.int32).astype(np.float32)
    m = ((f & np.uint32(0x007FFFFF)) | np.uint32(0x3F800000)).view(np.float32)
    v = fma(fma(fma(LOG[3], m, LOG[2]), m, LOG[1]), m, LOG[0])
    v = fma(log, LOG_SLOPE, v)  # -log2 u > 0, up to a factor
    # r = sqrt(2 ln 2 v), up to a factor that COS and SIN carry: the bit-trick seed of 1 / sqrt(v), then one Newton-like
    # step.
    y = (np.uint32(RSQRT_SEED) - ((w << np.uint32(31)) | (v.view(np.uint32) >> np.uint32(1)))).view(np.float32)
    a = v * y
    r = a * fma(-a, y, RSQRT)
    t = ((w & np.uint32(0x3FFE)) | np.uint32(0x4B000000)).view(np.float32) - np.float32(2**23 + 8191)
    z = t * t
    x_over_r = fma(fma(fma(COS[3], z, COS[2]), z, COS[1]), z, COS[0])
    y_over_rt = fma(fma(SIN[2], z, SIN[1]), z, SIN[0])
    return r * x_over_r, (r * t) * y_over_rt


def normal_blocks(seed: int, stream: int, block: npt.ArrayLike, domain: int = DOMAIN_NOISE) -> F32:
    """The eight normals of each noise block: u64 [...] -> f32 [..., 8]."""
    with np.errstate(over="ignore"):
        x, y = box_muller(words(seed, stream, block, domain))
    return np.stack([x, y], axis=-1).reshape(*x.shape[:-1], 8)


def normal(seed: int, stream: int, index: npt.ArrayLike, domain: int = DOMAIN_NOISE) -> F32:
    """noise(seed, stream, index) ~ N(0, 1).

    Args:
        seed: 64 bits, signed or unsigned.
        stream: 64 bits: `stream_id` of a tensor's name.
        index: u64 [...], row-major indices of elements.
        domain: DOMAIN_NOISE; of a factor's elements DOMAIN_LEFT or DOMAIN_RIGHT.

    Returns:
        float32 [...].

    Raises:
        ValueError: `seed` or `stream` does not fit in 64 bits.
    """
    index = np.asarray(index, np.uint64)
    blocks, where = np.unique(index >> np.uint64(3), return_inverse=True)
    normals = normal_blocks(u64(seed), u64(stream), blocks, domain)
    result: F32 = normals[where.reshape(index.shape), (index & np.uint64(7)).astype(np.intp)]
    return result


def factor(seed: int, stream: int, side: int, first: int, n: int, rank: int, step: int = 1) -> F32:
    """Rows first, first + step, ... of a factor of the noise of rank `rank`, E = L R^T / sqrt(rank), of one matrix.

    Args:
        seed: 64 bits, signed or unsigned.
        stream: 64 bits: `stream_id` of the matrix' name.
        side: DOMAIN_LEFT for L, a row for every row of the matrix; DOMAIN_RIGHT for R, a row for every column.
        first: First row or column of the matrix.
        n: Number of them.
        rank: Rank of the noise, 1 or more.
        step: From one of them to the next.

    Returns:
        float32 [n, rank]: element (i, q) of the whole factor is `normal` at index i * rank + q.
    """
    lines = np.arange(n, dtype=np.uint64)[:, None] * np.uint64(step) + np.uint64(first)
    return normal(seed, stream, lines * np.uint64(rank) + np.arange(rank, dtype=np.uint64), side)


def rank_scale(rank: int) -> np.float32:
    """1 / sqrt(rank) in float32: with it every element of L R^T has variance 1."""
    return np.float32(1 / math.sqrt(rank))


def rounding_thresholds(rounding_seed: int, stream: int, block: npt.ArrayLike) -> U32:
    """The eight 16-bit thresholds of stochastic rounding of each noise block: u64 [...] -> u32 [..., 8]."""
    w = words(rounding_seed, stream, block, DOMAIN_ROUNDING)
    return np.stack([w & np.uint32(0xFFFF), w >> np.uint32(16)], axis=-1).reshape(*w.shape[:-1], 8)


def _low(x: U64) -> U32:
    return (x & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def _high(x: U64) -> U32:
    return (x >> np.uint64(32)).astype(np.uint32)
