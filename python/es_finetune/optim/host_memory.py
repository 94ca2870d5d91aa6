"""Memory of the host for theta, which a GPU reads in place: one block for all tensors, registered with CUDA."""

from __future__ import annotations

import itertools
import mmap
import weakref
from collections.abc import Sequence

import numpy as np
import torch

from es_finetune.errors import RunError

_ALIGNMENT = 64  # bytes, of each tensor: a line of the processor's cache
_PORTABLE_AND_MAPPED = 3  # cudaHostRegisterPortable | cudaHostRegisterMapped: every GPU reads it at the host's address


def empty_like(
    tensors: Sequence[torch.Tensor], dtype: torch.dtype, gpu: torch.device | None = None
) -> list[torch.Tensor]:
    """For each tensor one in host memory, not initialised.

    Each has a storage of its own, so that it is copied and saved without the others. The block is freed with the last
    of them. It is as large as they are: torch's pinned memory rounds every tensor up to a power of two, 57.9 GB for the
    30.5 GB of Qwen2.5-7B.

    Args:
        tensors: On any device; their shapes and strides are taken over, not their values.
        dtype: Of the new tensors.
        gpu: A CUDA device, for which the memory is pinned. None: it is not pinned.

    Returns:
        One CPU tensor for each, each 64-byte aligned in one block.

    Raises:
        RunError: CUDA cannot pin it.
    """
    forms = [torch.empty_like(t, dtype=dtype, device="meta") for t in tensors]
    sizes = [form.untyped_storage().nbytes() for form in forms]
    starts = [0, *itertools.accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]
    memory = mmap.mmap(-1, max(starts[-1], 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block = np.frombuffer(memory, np.uint8)
    if gpu is not None:
        # A child that shared the pages would have us write to copies, which the GPU does not see
        memory.madvise(mmap.MADV_DONTFORK)
        _register(block, gpu)
    storages = [
        torch.from_numpy(block[start : start + size]).untyped_storage()
        for start, size in zip(starts[:-1], sizes, strict=True)
    ]
    return [
        torch.empty(0, dtype=dtype).set_(storage, 0, form.shape, form.stride())
        for storage, form in zip(storages, forms, strict=True)
    ]


def _register(block: np.ndarray, gpu: torch.device) -> None:
    """Pins the block until it is freed."""
    cudart = torch.cuda.cudart()
    with torch.cuda.device(gpu):
        status = int(cudart.cudaHostRegister(block.ctypes.data, block.nbytes, _PORTABLE_AND_MAPPED))
    if status:
        size = f"{block.nbytes / 1e9:.1f} GB"
        raise RunError(
            f'CUDA cannot pin {size} of host memory for master="host" (error {status}): free some, or choose '
            'master="copy"'
        )
    # The driver does so when the process ends
    weakref.finalize(block, cudart.cudaHostUnregister, block.ctypes.data).atexit = False
