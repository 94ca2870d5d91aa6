"""The CUDA backend, through ctypes: one launch for the whole table, on torch's current stream."""

from __future__ import annotations

import ctypes
import functools

import torch

from .. import native, streams
from ..layout import Pack
from ..low_rank import FactorLayout
from ..segment import DTYPES

_HOST_SEEDS = 128  # ES_CUDA_HOST_SEEDS: up to this many travel in the kernel's parameters


def unavailable(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it serves CUDA tensors, not {device.type}"
    if torch.version.hip:
        return "this torch is built for ROCm: the triton backend serves AMD GPUs"
    return native.why_not("cuda") or _driver_problem() or _capability_problem(device)


@functools.cache
def _driver_problem() -> str | None:
    driver, runtime, devices = versions()
    if driver == 0:
        return "no NVIDIA driver is installed"
    if driver // 1000 < runtime // 1000:
        return (
            f"the driver supports CUDA {driver // 1000}, libes_cuda.so needs {runtime // 1000}: update the driver "
            "(triton >= 3.6 serves meanwhile)"
        )
    return None if devices else "CUDA sees no device"


@functools.cache
def _capability_problem(device: torch.device) -> str | None:
    """A GPU older than the library's code is refused before a launch fails. Newer ones are served: it embeds PTX
    (setup.py)."""
    if not torch.cuda.is_available():  # nothing to ask: CUDA tensors cannot exist
        return None
    (major, minor), least = torch.cuda.get_device_capability(device), _library().es_cuda_capability()
    if 10 * major + minor >= least:
        return None
    return (
        f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, libes_cuda.so was built for "
        f"{least // 10}.{least % 10} and newer: rebuild it with ES_KERNELS_CUDA=1 "
        f"ES_KERNELS_CUDA_ARCHS={major}{minor} (triton >= 3.6 serves meanwhile)"
    )


def versions() -> tuple[int, int, int]:
    """(driver, runtime, devices): CUDA's numbers, 13000 for 13.0; driver 0 means that none is installed."""
    driver, runtime, devices = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    # An error means no device, which the numbers say too
    _library().es_cuda_versions(ctypes.byref(driver), ctypes.byref(runtime), ctypes.byref(devices))
    return driver.value, runtime.value, devices.value


def add_noise_(
    pack: Pack,
    seeds: torch.Tensor,
    coefs: torch.Tensor,
    rounding_seed: torch.Tensor | None,
    decay: float,
    noise_rank: int,
) -> None:
    # torch's guard, not the library's: it goes back to another device only if that has a context already.
    with torch.cuda.device(pack.device):
        if seeds.numel() > _HOST_SEEDS:
            seeds, coefs = streams.staged(pack.device, seeds, coefs)
        seeds, coefs = seeds.contiguous(), coefs.contiguous()
        status = _library().es_cuda_add_noise(
            pack.on_device().data_ptr(), len(pack.segments), pack.units,
            seeds.data_ptr(), seeds.is_cuda, coefs.data_ptr(), coefs.is_cuda, seeds.numel(), decay,
            None if rounding_seed is None else rounding_seed.data_ptr(),
            rounding_seed is not None and rounding_seed.is_cuda, noise_rank,
            pack.device.index, torch.cuda.current_stream(pack.device).cuda_stream,
        )  # fmt: skip
    native.check(status, _library().es_cuda_error)


def factors(layout: FactorLayout, out: torch.Tensor, seeds: torch.Tensor) -> None:
    with torch.cuda.device(out.device):
        if seeds.numel() > _HOST_SEEDS:
            (seeds,) = streams.staged(out.device, seeds)
        seeds = seeds.contiguous()
        status = _library().es_cuda_factors(
            layout.on_device(out.device).data_ptr(), len(layout.table), layout.units,
            seeds.data_ptr(), seeds.is_cuda, seeds.numel(), out.data_ptr(), DTYPES[out.dtype],
            out.device.index, torch.cuda.current_stream(out.device).cuda_stream,
        )  # fmt: skip
    native.check(status, _library().es_cuda_error)


def fingerprint(pack: Pack) -> torch.Tensor:
    result = torch.zeros((), dtype=torch.int64, device=pack.device)
    with torch.cuda.device(pack.device):
        stream = torch.cuda.current_stream(pack.device).cuda_stream
        status = _library().es_cuda_fingerprint(
            pack.on_device().data_ptr(), len(pack.segments), pack.units, result.data_ptr(), pack.device.index, stream
        )
    native.check(status, _library().es_cuda_error)
    return result


@functools.cache
def _library() -> ctypes.CDLL:
    return declared(native.load("cuda"))


def declared(c: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions."""
    p, i64, i = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    c.es_cuda_error.restype = ctypes.c_char_p
    c.es_cuda_add_noise.argtypes = (p, i64, i64, p, i, p, i, i64, ctypes.c_float, p, i, i, i, p)
    c.es_cuda_factors.argtypes = (p, i64, i64, p, i, i64, p, i, i, p)
    c.es_cuda_fingerprint.argtypes = (p, i64, i64, p, i, p)
    return c
