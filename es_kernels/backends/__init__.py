"""The implementations of the operation and the choice among them. A backend is a module with

    unavailable(device) -> None, or one line that says why it cannot serve tensors on `device`
    add_noise_(pack, seeds, coefs, rounding_seed, decay)      the op, on a checked Pack
    fingerprint(pack) -> int64 tensor []

Which one serves never changes a bit of the result.
"""

import contextlib
import functools
import importlib
import os
import threading
import warnings

import torch

from .. import native

NAMES = ("cuda", "triton", "cpu", "reference")
# Best first. The reference serves CUDA tensors only when asked to: copying a model to the host by surprise would hide a
# broken install.
_ORDER = {"cuda": ("cuda", "triton"), "cpu": ("cpu", "reference")}
_override = threading.local()


@contextlib.contextmanager
def backend(name):
    """`with es_kernels.backend("reference"): ...`: that backend serves every call of this thread. ES_KERNELS_BACKEND
    does so for a process."""
    _check_name(name, "backend")
    previous = getattr(_override, "name", None)
    _override.name = name
    try:
        yield
    finally:
        _override.name = previous


def choose(device):
    """The backend module for tensors on `device`. Raises RuntimeError that says why none, or not the one asked for, can
    serve."""
    asked = getattr(_override, "name", None) or os.environ.get("ES_KERNELS_BACKEND")
    if asked:
        _check_name(asked, "ES_KERNELS_BACKEND")
        why = unavailable(asked, device)
        if why:
            raise RuntimeError(f"the {asked} backend was asked for, but {why}")
        return _module(asked)
    reasons = []
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
def _warn(name, kind, reasons):
    """Says so where a slow backend serves, or another than the one whose library is there and broken."""
    if name == "reference" or (native.path(kind).exists() and native.why_not(kind)):
        slow = "SLOW, 100 ns a value and seed: " if name == "reference" else ""
        warnings.warn(
            f"es_kernels: {slow}the {name} backend serves {kind} tensors, for {'; '.join(reasons)}", stacklevel=2
        )


def active_backend(device="cpu"):
    """The name of the backend that serves tensors on `device`."""
    return choose(torch.device(device)).__name__.rpartition(".")[2]


def unavailable(name, device):
    """Why backend `name` cannot serve tensors on `device`, or None."""
    return _module(name).unavailable(device)


@functools.cache
def _module(name):
    return importlib.import_module(f"{__name__}.{name}")


def _check_name(name, source):
    if name not in NAMES:
        raise ValueError(f"{source}: there is no backend {name!r}; there are {', '.join(NAMES)}")
