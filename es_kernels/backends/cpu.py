"""The C++ backend, through ctypes: threads and SIMD, AVX-512, AVX2 or baseline, whichever is best here, or NEON.
ES_KERNELS_ISA picks another."""

from __future__ import annotations

import ctypes
import functools
import os

import torch

from .. import native
from ..layout import Pack
from ..low_rank import FactorLayout
from ..segment import DTYPES


def unavailable(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"it serves CPU tensors, not {device.type}"
    return native.why_not("cpu")


def isas() -> list[str]:
    """The instruction sets that this processor can run, best first."""
    names: bytes = _library().es_cpu_isas()
    return names.decode().split()


def add_noise_(
    pack: Pack,
    seeds: torch.Tensor,
    coefs: torch.Tensor,
    rounding_seed: torch.Tensor | None,
    decay: float,
    noise_rank: int,
) -> None:
    seeds, coefs = seeds.contiguous(), coefs.contiguous()  # named, so that their memory outlives the call
    rounding = None if rounding_seed is None else rounding_seed.contiguous()
    status = _library().es_cpu_add_noise(
        pack.segments.ctypes.data, len(pack.segments), seeds.data_ptr(), coefs.data_ptr(), seeds.numel(), decay,
        None if rounding is None else rounding.data_ptr(), noise_rank, torch.get_num_threads(), _isa(),
    )  # fmt: skip
    native.check(status, _library().es_cpu_error)


def factors(layout: FactorLayout, out: torch.Tensor, seeds: torch.Tensor) -> None:
    seeds = seeds.contiguous()
    status = _library().es_cpu_factors(
        layout.table.ctypes.data, len(layout.table), seeds.data_ptr(), seeds.numel(), out.data_ptr(), DTYPES[out.dtype],
        torch.get_num_threads(), _isa(),
    )  # fmt: skip
    native.check(status, _library().es_cpu_error)


def fingerprint(pack: Pack) -> torch.Tensor:
    result = torch.zeros((), dtype=torch.int64, device="cpu")
    status = _library().es_cpu_fingerprint(
        pack.segments.ctypes.data, len(pack.segments), result.data_ptr(), torch.get_num_threads(), _isa()
    )
    native.check(status, _library().es_cpu_error)
    return result


def _isa() -> bytes | None:
    name = os.environ.get("ES_KERNELS_ISA")
    return name.encode() if name else None


@functools.cache
def _library() -> ctypes.CDLL:
    c = native.load("cpu")
    p, i64 = ctypes.c_void_p, ctypes.c_int64
    c.es_cpu_error.restype = c.es_cpu_isas.restype = ctypes.c_char_p
    i, text = ctypes.c_int, ctypes.c_char_p
    c.es_cpu_add_noise.argtypes = (p, i64, p, p, i64, ctypes.c_float, p, i, i, text)
    c.es_cpu_factors.argtypes = (p, i64, p, i64, p, i, i, text)
    c.es_cpu_fingerprint.argtypes = (p, i64, p, i, text)
    return c
