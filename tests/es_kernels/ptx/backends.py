"""The interpreter behind the `cuda` and the `triton` backend, on CPU tensors: their own host code chooses the kernel,
the grid and the parameters, and what nvcc or Triton made for compute capability 9.0 runs.

`Cuda` is csrc/cuda.cu, compiled by nvcc as in setup.py, with cudart.cpp in the place of CUDA's runtime. `Triton` is
backends/triton.py with its kernels specialised and compiled as its launches ask for.
"""

import ast
import contextlib
import ctypes
import functools
import importlib.util
import inspect
import pathlib
import shutil
import subprocess
import types

import numpy as np
import pytest
import torch

from es_kernels.backends import triton as triton_backend
from es_kernels.backends.triton import triton
from es_kernels.segment import SEGMENT

from . import interpreter

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[2]
_SIZES = np.array([4, 2, 2])  # bytes of a DTYPE of es_kernels.segment


@contextlib.contextmanager
def default_floats():
    """The floating-point state of this thread as a program finds it at its start: a GPU knows nothing of rounding modes
    and flushing set here."""
    libm, state = ctypes.CDLL("libm.so.6"), (ctypes.c_uint32 * 8)()
    libm.fegetenv(state)
    libm.fesetenv(ctypes.c_void_p(-1))
    try:
        yield
    finally:
        libm.fesetenv(state)


def reach(segments, n_segments, *others):
    """The memory that a call may touch: the table, the elements of its segments and no gap between them; others:
    (address, bytes, writable)."""
    ranges = [(segments, n_segments * SEGMENT.itemsize, False), *others]
    table = np.frombuffer((ctypes.c_char * (n_segments * SEGMENT.itemsize)).from_address(segments), SEGMENT)
    for s in table:
        for what in ("out", "base", "anchor"):
            size = int(_SIZES[s[f"{what}_dtype"]])
            if s[what]:
                ranges += [
                    (int(s[what]) + row * int(s[f"{what}_stride"]) * size, int(s["cols"]) * size, what == "out")
                    for row in range(s["rows"])
                ]
    return interpreter.process_memory(ranges)


def compile_cuda(folder):
    """libes_cuda.so and cuda.ptx, in `folder`."""
    setup = ast.parse((ROOT / "setup.py").read_text())
    flags = next(
        ast.literal_eval(n.value) for n in setup.body if isinstance(n, ast.Assign) and n.targets[0].id == "NVCC_FLAGS"
    )
    flags = [f for f in flags if not f.startswith("-cudart")] + [
        "-cudart=none",
        "-gencode=arch=compute_90,code=compute_90",
        "-shared",
    ]
    sources, library = (ROOT / "csrc/cuda.cu", HERE / "cudart.cpp"), folder / "libes_cuda.so"
    subprocess.run([nvcc(), *flags, "--keep", "--keep-dir", folder, *sources, "-o", library], check=True)


class Cuda:
    """libes_cuda.so of compile_cuda's `folder`, whose launches run PTX."""

    def __init__(self, folder):
        self.library = ctypes.CDLL(str(folder / "libes_cuda.so"))
        self.kernels = interpreter.parse((folder / "cuda.ptx").read_text())
        arguments = ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t
        self._callback = ctypes.CFUNCTYPE(ctypes.c_int, *arguments)(self._launch)
        ctypes.c_void_p.in_dll(self.library, "es_ptx_launch").value = ctypes.cast(self._callback, ctypes.c_void_p).value

    @contextlib.contextmanager
    def launching(self, *ranges):
        """Launches within may touch what reach(*ranges) gives; what went wrong in one is raised here."""
        self.memory, self.error = reach(*ranges), None
        try:
            yield
        finally:
            if self.error:
                raise self.error

    def _launch(self, name, grid, threads, arguments, shared_bytes):
        try:
            kernel = self.kernels[name.decode()]
            parameters = np.zeros(kernel.parameter_bytes, np.uint8)
            for argument, (at, size) in zip(arguments, kernel.parameters.values(), strict=False):
                parameters[at : at + size] = np.frombuffer(ctypes.string_at(argument, size), np.uint8)
            with default_floats():
                interpreter.launch(kernel, grid, threads, parameters, shared_bytes, self.memory)
            return 0
        except Exception as error:  # a C function calls: nobody else would hear of it
            self.error = error
            return 719  # cudaErrorLaunchFailure


def nvcc():
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


class Triton:
    """backends/triton.py, whose launches run PTX."""

    def __init__(self):
        with _compiling():
            spec = importlib.util.spec_from_file_location(
                "es_kernels.backends.triton_ptx", inspect.getfile(triton_backend)
            )
            self.backend = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(self.backend)
        for name in ("_add_noise_kernel", "_fingerprint_kernel", "_factors_kernel"):
            kernel = getattr(self.backend, name)
            setattr(self.backend, name, _Launcher(self, kernel))
        self.kernels = {}  # what was launched: (name, text) -> Kernel


class _Launcher:
    """kernel[grid](...) as Triton's, up to the launch itself."""

    def __init__(self, owner, kernel):
        self.owner, self.kernel = owner, kernel

    def __getitem__(self, grid):
        return functools.partial(self.launch, grid)

    def launch(self, grid, *arguments, **named):
        with _compiling():
            compiled = self.kernel.run(*arguments, grid=grid, warmup=True, **named)
        named |= zip(self.kernel.arg_names, arguments, strict=False)
        values = [named[name] for name, type in compiled.src.signature.items() if type != "constexpr"]
        text = compiled.asm["ptx"]
        if text not in self.owner.kernels:
            (self.owner.kernels[text],) = interpreter.parse(text).values()
        kernel = self.owner.kernels[text]
        # The last two, scratch memory that it does not ask for, stay null
        parameters = np.zeros(kernel.parameter_bytes, np.uint8)
        for value, (at, size) in zip(values, kernel.parameters.values(), strict=False):
            value = (
                np.float32(value)
                if isinstance(value, float)
                else np.int64(value.data_ptr() if isinstance(value, torch.Tensor) else value)
            )
            parameters[at : at + size] = np.frombuffer(value.tobytes()[:size], np.uint8)
        ranges = [
            (v.data_ptr(), v.nbytes, name in ("sums", "out"))
            for name, v in named.items()
            if isinstance(v, torch.Tensor)
        ]
        if "segments" in named:
            memory = reach(named["segments"].data_ptr(), named["n_segments"], *ranges)
        else:
            memory = interpreter.process_memory(ranges)
        threads = interpreter.WARP * compiled.metadata.num_warps
        with default_floats():
            interpreter.launch(kernel, grid[0], threads, parameters, compiled.metadata.shared, memory)


@contextlib.contextmanager
def _compiling():
    """Where kernels are compiled for compute capability 9.0, also where tests have them interpreted and there is no
    GPU. Triton's own library of kernels, tl.sum among them, was made for its interpreter when it was imported:
    JITFunction serves it here."""
    from triton.runtime import driver, interpreter

    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    device = types.SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setattr(driver, "_active", device)
        for module in (triton.language, triton.language.standard):
            for name, function in list(vars(module).items()):
                if isinstance(function, interpreter.InterpretedFunction):
                    patch.setattr(module, name, _jit(function.fn))
        yield


@functools.cache
def _jit(function):
    return triton.runtime.jit.JITFunction(function)
