"""`es-finetune env`: what an issue report needs to say of a machine. It names no folder, user or host."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Callable
from pathlib import Path

PACKAGES = (
    "es-kernels torch triton numpy transformers tokenizers safetensors huggingface-hub peft datasets vllm ray "
    "tensorboard wandb trackio"
).split()
_NVIDIA = Path("/proc/driver/nvidia/version")


def environment() -> dict[str, str]:
    """What is installed and what serves, by name. Every probe is guarded: what is broken is told in its own words."""
    facts = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _probe(_processor),
        "instruction sets": _probe(_instruction_sets),
        **{name: _probe(_version, name) for name in PACKAGES},
        "CUDA of torch": _probe(_cuda),
        "GPUs": _probe(_gpus),
        "driver": _probe(_driver),
    }
    return facts | _backends()


def _probe(ask: Callable[..., str], *about: str) -> str:
    try:
        return _without_folders(ask(*about))
    except Exception as error:
        return _unknown(error)


def _unknown(error: Exception) -> str:
    return _without_folders(f"unknown: {type(error).__name__}: {error}".splitlines()[0])


def _without_folders(text: str) -> str:
    """Of each path its last name."""
    return re.sub(r"(?<![\w.:/])/(?:[^\s:'\",;()/]+/)+", "", text)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    models = re.findall(r"^model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{models[0]}, {len(models)} threads" if models else platform.machine()


def _instruction_sets() -> str:
    """Those of the CPU backend's library that this processor has; the first one is used."""
    from es_kernels.backends import cpu

    return ", ".join(cpu.isas())


def _cuda() -> str:
    import torch

    return torch.version.cuda or "none: a build for CPUs or ROCm"


def _gpus() -> str:
    import torch

    return ", ".join(torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())) or "none"


def _driver() -> str:
    match = re.search(r"Kernel Module\D*([\d.]+)", _NVIDIA.read_text()) if _NVIDIA.exists() else None
    return match[1] if match else "none"


def _backends() -> dict[str, str]:
    """Of each backend of es_kernels whether it can serve, and of each kind of device which one does."""
    try:
        import torch

        from es_kernels import active_backend, backends
    except Exception as error:
        return {"backends": _unknown(error)}
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

    def state(name: str) -> str:
        device = torch.device("cpu" if name in ("cpu", "reference") else "cuda")
        ready = "available" if device.type in kinds else "ready, but torch sees no GPU"
        return backends.unavailable(name, device) or ready

    states = {f"backend {name}": _probe(state, name) for name in backends.NAMES}
    return states | {f"serves {kind}": _probe(active_backend, kind) for kind in kinds}
