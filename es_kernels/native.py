"""Loads the two shared libraries of the C ABI (csrc/es_kernels.h) and says why one cannot be had."""

from __future__ import annotations

import ctypes
import functools
import pathlib
from collections.abc import Callable

ABI = 3  # ES_ABI of csrc/es_kernels.h


def path(name: str) -> pathlib.Path:
    return pathlib.Path(__file__).parent / f"libes_{name}.so"


@functools.cache
def _load(name: str) -> tuple[ctypes.CDLL | None, str | None]:
    """(library, None) or (None, one line that says why not)."""
    if not path(name).exists():
        made = {"cpu": "without a C++ compiler", "cuda": "without nvcc, or nvcc failed"}[name]
        return (
            None,
            f"{path(name).name} was not built (the wheel was made {made}, or this is a source tree: run `make build`)",
        )
    try:
        library = ctypes.CDLL(str(path(name)))
        abi = getattr(library, f"es_{name}_abi")()
    except (OSError, AttributeError) as error:
        words = str(error).replace(f"{path(name).parent}/", "")  # reports are read by others
        return None, f"{path(name).name} does not load: {words}"
    if abi != ABI:
        return None, f"{path(name).name} has ABI {abi}, this Python side needs {ABI}: rebuild or reinstall es-kernels"
    return library, None


def why_not(name: str) -> str | None:
    """One line that says why the library `name`, "cpu" or "cuda", cannot be used, or None."""
    return _load(name)[1]


def load(name: str) -> ctypes.CDLL:
    """The library `name`, "cpu" or "cuda". Raises RuntimeError that says why it cannot be used."""
    library, why = _load(name)
    if library is None:
        raise RuntimeError(f"the {name} library cannot be used: {why}")
    return library


def check(status: int, error: Callable[[], bytes]) -> None:
    """Raises the library's own words if a call returned an error code."""
    if status:
        raise RuntimeError(error().decode())
