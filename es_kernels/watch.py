"""Whether the tensors of a table still are where and what they were: asked at every call, of every tensor."""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from . import native


class Watch:
    """Remembers address, dtype, shape and strides of `tensors`, a list that nobody changes.

    libes_cpu.so asks torch through the getters of torch's own C ABI (csrc/tensors.cpp): 30 ns a tensor. A method call
    from Python takes 75 ns, and four would be needed. Without the library Python asks, 500 ns a tensor.
    """

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._tensors = tensors
        self._asks = _asks()
        if self._asks is None:
            self._forms = list(map(_form, tensors))
            return
        handles, free = self._asks.handles(tensors)
        weakref.finalize(self, free, handles).atexit = False
        self._handles = (ctypes.c_void_p * len(handles))(*handles)
        self._words = np.empty(sum(3 + 2 * t.dim() for t in tensors), np.int64)
        self._arguments = ctypes.addressof(self._handles), len(handles), self._words.ctypes.data
        self._asks.first_changed(*self._arguments, True)

    def first_changed(self) -> int | None:
        """The number of a tensor that is another than it was, or None."""
        if self._asks is None:
            return next(
                (i for i, (t, form) in enumerate(zip(self._tensors, self._forms, strict=True)) if _form(t) != form),
                None,
            )
        i = self._asks.first_changed(*self._arguments, False)
        return None if i == len(self._handles) else i


def _form(t: torch.Tensor) -> tuple[Any, ...]:
    return t.data_ptr(), t.dtype, t.shape, t.stride()


class _Asks:
    """csrc/tensors.cpp on tensors. AttributeError, OSError or RuntimeError where the library, or torch's side of it, is
    not there."""

    _GETTERS = ("data_ptr", "dtype", "dim", "sizes", "strides")  # EsTensorGetters of csrc/es_kernels.h

    def __init__(self) -> None:
        c = ctypes.CDLL(torch._C.__file__)
        self._getters = (ctypes.c_void_p * len(self._GETTERS))(
            *(ctypes.cast(getattr(c, f"aoti_torch_get_{name}"), ctypes.c_void_p).value for name in self._GETTERS)
        )
        # PYFUNCTYPE: with the interpreter's lock held, under which nobody moves a tensor meanwhile.
        p, i64 = ctypes.c_void_p, ctypes.c_int64
        first_changed = ctypes.PYFUNCTYPE(i64, p, p, i64, p, ctypes.c_int)(("es_cpu_first_changed", native.load("cpu")))
        self.first_changed = functools.partial(first_changed, ctypes.addressof(self._getters))
        self._allocate = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors
        self._delete = ctypes.PYFUNCTYPE(ctypes.c_int32, p)(("aoti_torch_delete_tensor_object", c))

    def handles(self, tensors: list[torch.Tensor]) -> tuple[list[int], Callable[[Any], Any]]:
        """(addresses of handles, the function that frees them). Each holds its tensor, not what the tensor's memory
        is."""
        pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
            ("PyCapsule_GetPointer", ctypes.pythonapi)
        )
        handles = [pointer(capsule, None) for capsule in self._allocate(tensors)]
        return handles, lambda handles: [self._delete(handle) for handle in handles]


@functools.cache
def _asks() -> _Asks | None:
    try:
        return _Asks()
    except (AttributeError, OSError, RuntimeError):
        return None
