"""What a GPU's queue asks of those who hand it memory: nothing here waits for it."""

from __future__ import annotations

import torch


def current(device: torch.device) -> tuple[torch.cuda.Stream | None, bool]:
    """(the device's current stream, whether a CUDA graph is being captured on it); (None, False) where there are no
    streams."""
    if device.type != "cuda":
        return None, False
    with torch.cuda.device(device):  # capturing is asked of the current device
        return torch.cuda.current_stream(device), torch.cuda.is_current_stream_capturing()


def staged(device: torch.device, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Seeds and coefficients on `device`, for a kernel on its current stream. Through pinned memory: a copy from other
    memory first waits for all that is queued. RuntimeError while a CUDA graph is captured: it would copy from memory
    that is another call's when it is replayed."""
    result = []
    for t in tensors:
        if t.device != device and t.numel():
            if current(device)[1]:
                what = f"pass seeds, coefs and rounding_seed as tensors on {device}"
                raise RuntimeError(f"while a CUDA graph is captured, {what}: replays read what they hold then")
            t = t.contiguous().pin_memory() if t.device.type == "cpu" and device.type == "cuda" else t
        result.append(t.to(device, non_blocking=True).contiguous())
    return result
