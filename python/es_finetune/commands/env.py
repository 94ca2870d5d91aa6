"""`es-finetune env`: what an issue report needs to say of a machine. It names no folder, user or host."""

from __future__ import annotations

import platform

from es_finetune.runs.environment import driver, gpus, probe, processor, unknown, version

PACKAGES = (
    "es-kernels torch triton numpy transformers tokenizers safetensors huggingface-hub peft datasets vllm ray "
    "tensorboard wandb trackio"
).split()


def environment() -> dict[str, str]:
    """What is installed and what serves, by name. Every probe is guarded: what is broken is told in its own words."""
    facts = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": probe(processor),
        "instruction sets": probe(_instruction_sets),
        **{name: probe(version, name) for name in PACKAGES},
        "CUDA of torch": probe(_cuda),
        "GPUs": probe(gpus),
        "driver": probe(driver),
    }
    return facts | _backends()


def _instruction_sets() -> str:
    """Those of the CPU backend's library that this processor has; the first one is used."""
    from es_kernels.backends import cpu

    return ", ".join(cpu.isas())


def _cuda() -> str:
    import torch

    return torch.version.cuda or "none: a build for CPUs or ROCm"


def _backends() -> dict[str, str]:
    """Of each backend of es_kernels whether it can serve, and of each kind of device which one does."""
    try:
        import torch

        from es_kernels import active_backend, backends
    except Exception as error:
        return {"backends": unknown(error)}
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

    def state(name: str) -> str:
        device = torch.device("cpu" if name in ("cpu", "reference") else "cuda")
        ready = "available" if device.type in kinds else "ready, but torch sees no GPU"
        return backends.unavailable(name, device) or ready

    states = {f"backend {name}": probe(state, name) for name in backends.NAMES}
    return states | {f"serves {kind}": probe(active_backend, kind) for kind in kinds}
