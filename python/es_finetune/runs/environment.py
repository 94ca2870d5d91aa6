"""The machine and the packages of a run, each fact in one line. None names a folder, a user or a host.

torch is imported where it is asked: `es-finetune env` must speak of one that is broken.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Callable
from pathlib import Path

_NVIDIA = Path("/proc/driver/nvidia")


def versions() -> dict[str, str]:
    """What the log's header says of the software, by name."""
    import torch

    import es_kernels

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": probe(version, "transformers"),
        "es_kernels": es_kernels.__version__,
    }


def machine(backend: str) -> dict[str, str]:
    """What the log's header says of the hardware that a worker of this process uses.

    Args:
        backend: Of es_kernels, as the worker names it.

    Returns:
        `processor`, and `gpu` and `driver`, which are "none" without one and "not used" for a worker on the CPU.
    """
    on_cpu = backend.startswith(("cpu", "reference"))
    unused = "none" if probe(gpus) == "none" else "not used"
    return {
        "processor": probe(processor),
        "gpu": unused if on_cpu else probe(gpus),
        "driver": unused if on_cpu else probe(driver),
    }


def probe(ask: Callable[..., str], *about: str) -> str:
    """What `ask` says; what is broken is told in its own words."""
    try:
        return _without_folders(ask(*about))
    except Exception as error:
        return unknown(error)


def unknown(error: Exception) -> str:
    return _without_folders(f"unknown: {type(error).__name__}: {error}".splitlines()[0])


def _without_folders(text: str) -> str:
    """Of each path its last name."""
    return re.sub(r"(?<![\w.:/])/(?:[^\s:'\",;()/]+/)+", "", text)


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def processor() -> str:
    models = re.findall(r"^model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{models[0]}, {len(models)} threads" if models else platform.machine()


def gpus() -> str:
    """The names of those that can be used, without taking memory of any: a context of CUDA takes half a gigabyte."""
    import torch

    if not torch.cuda.is_available():
        return "none"
    files = sorted(_NVIDIA.glob("gpus/*/information"))
    if torch.cuda.is_initialized() or not files:
        return ", ".join(torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count()))
    return ", ".join(re.sub(r"(?s).*Model:\s*([^\n]*).*", r"\1", file.read_text()) for file in files)


def driver() -> str:
    file = _NVIDIA / "version"
    match = re.search(r"Kernel Module\D*([\d.]+)", file.read_text()) if file.exists() else None
    return match[1] if match else "none"
