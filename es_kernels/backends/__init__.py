"""The implementations of the operation, and the choice among them. It never changes a bit of the result."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import threading
import warnings
from collections.abc import Iterator
from typing import Protocol, cast

import torch

from .. import native
from ..layout import Pack
from ..low_rank import FactorLayout

NAMES = ("cuda", "triton", "cpu", "reference")
# Best first. The reference serves CUDA tensors only when asked to: copying a model to the host by surprise would hide a
# broken install.
_ORDER = {"cuda": ("cuda", "triton"), "cpu": ("cpu", "reference")}
_override = threading.local()


class Backend(Protocol):
    """What the module of a backend holds."""

    __name__: str

    def unavailable(self, device: torch.device) -> str | None:
        """None, or one line that says why it cannot serve tensors on `device`."""

    def add_noise_(
        self,
        pack: Pack,
        seeds: torch.Tensor,
        coefs: torch.Tensor,
        rounding_seed: torch.Tensor | None,
        decay: float,
        noise_rank: int,
    ) -> None:
        """The op, on a checked Pack: int64 seeds [N] and float32 coefs [N], each on the CPU or on the Pack's device;
        int64 rounding_seed [1], or None to round to nearest; a decay that is a float32; noise_rank > 0 if the Pack was
        made for matrices."""

    def factors(self, layout: FactorLayout, out: torch.Tensor, seeds: torch.Tensor) -> None:
        """Fills `out` [seeds * layout.elements]; int64 seeds [N] on the CPU or on its device."""

    def fingerprint(self, pack: Pack) -> torch.Tensor:
        """int64 [], on the CPU or on the Pack's device."""
        ...


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """`with es_kernels.backend("reference"): ...`: that backend serves every call of this thread. The environment
    variable ES_KERNELS_BACKEND does so for a process.

    Args:
        name: "cuda", "triton", "cpu" or "reference".

    Raises:
        ValueError: There is no such backend. A call inside raises RuntimeError if this one cannot serve its tensors.
    """
    _check_name(name, "backend")
    previous = getattr(_override, "name", None)
    _override.name = name
    try:
        yield
    finally:
        _override.name = previous


def choose(device: torch.device) -> Backend:
    """The backend for tensors on `device`. Raises RuntimeError that says why none, or not the one asked for, can
    serve."""
    asked = getattr(_override, "name", None) or os.environ.get("ES_KERNELS_BACKEND")
    if asked:
        _check_name(asked, "ES_KERNELS_BACKEND")
        why = unavailable(asked, device)
        if why:
            raise RuntimeError(f"the {asked} backend was asked for, but {why}")
        return _module(asked)
    reasons: list[str] = []
    for name in _ORDER.get(device.type, ()):
        why = unavailable(name, device)
        if why is None:
            if reasons:
                _warn(name, device.type, tuple(reasons))
            return _module(name)
        reasons.append(f"{name}: {why}")
    raise RuntimeError(
        f"no backend for tensors on {device}: " + ("; ".join(reasons) or "CPU, CUDA and ROCm devices are supported")
    )


@functools.cache  # once
def _warn(name: str, kind: str, reasons: tuple[str, ...]) -> None:
    """Says so where a slow backend serves, or another than the one whose library is there and broken."""
    if name == "reference" or (native.path(kind).exists() and native.why_not(kind)):
        slow = "SLOW, 100 ns a value and seed: " if name == "reference" else ""
        warnings.warn(
            f"es_kernels: {slow}the {name} backend serves {kind} tensors, for {'; '.join(reasons)}", stacklevel=2
        )


def active_backend(device: torch.device | str = "cpu") -> str:
    """Which backend serves tensors on `device`.

    Args:
        device: As torch.device takes it.

    Returns:
        Its name: "cuda", "triton", "cpu" or "reference".

    Raises:
        RuntimeError: None can, or not the one that `backend` or ES_KERNELS_BACKEND asks for. The error says why.
        ValueError: ES_KERNELS_BACKEND names no backend.
    """
    return choose(torch.device(device)).__name__.rpartition(".")[2]


def unavailable(name: str, device: torch.device) -> str | None:
    """Why backend `name` cannot serve tensors on `device`, or None."""
    return _module(name).unavailable(device)


@functools.cache
def _module(name: str) -> Backend:
    return cast(Backend, importlib.import_module(f"{__name__}.{name}"))


def _check_name(name: str, source: str) -> None:
    if name not in NAMES:
        raise ValueError(f"{source}: there is no backend {name!r}; there are {', '.join(NAMES)}")
