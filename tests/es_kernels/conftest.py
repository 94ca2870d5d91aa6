"""What the tests of es_kernels share: bit patterns, weights that are hard to get right, one way to run a call on two
backends."""

import contextlib
import ctypes
import functools
import itertools
import os
import pathlib
import shlex
import shutil
import subprocess
import types

import numpy as np
import pytest
import torch

import es_kernels
from es_kernels import native
from es_kernels.backends import cpu, cuda
from es_kernels.layout import Layout
from es_kernels.low_rank import FACTOR
from es_kernels.segment import SIZES

from .aarch64 import emulator
from .ptx import backends as ptx

ROOT = pathlib.Path(__file__).parents[2]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_STORAGE = {torch.float32: np.uint32, torch.bfloat16: np.uint16, torch.float16: np.uint16}
# Quiet and signalling NaNs, infinities, zeros, smallest, middle and largest subnormals and normals, of both signs; 1,
# and the ulp around it.
_HARD_F32 = [
    0x7FC12345,
    0x7F800001,
    0x7F800000,
    0,
    1,
    2,
    0x400000,
    0x7FFFFF,
    0x800000,
    0x7F7FFFFF,
    0x3F800000,
    0x3F7FFFFF,
    0x477FEFFF,
    0x477FF000,
    0x33000000,
    0x33000001,
    0x387FFFFF,
]
_HARD_BF16 = [0x7FC1, 0x7F81, 0x7F80, 0, 1, 2, 0x40, 0x7F, 0x80, 0x7F7F, 0x3F80, 0x3F7F]
_HARD_F16 = [0x7E01, 0x7C01, 0x7C00, 0, 1, 2, 0x200, 0x3FF, 0x400, 0x7BFF, 0x3C00, 0x3BFF]
_HARD = {torch.float32: (_HARD_F32, 31), torch.bfloat16: (_HARD_BF16, 15), torch.float16: (_HARD_F16, 15)}


@pytest.fixture
def bits():
    """The tensor as integers of its width: == on them is equality to the bit, -0 and NaN included. A copy."""
    return lambda tensor: tensor.detach().clone().contiguous().view(_INTEGERS[tensor.element_size()])


@pytest.fixture
def weights():
    """make(n, dtype, seed=0): n weights ~ N(0, 0.1), one in four of them NaN, inf, -0, subnormal or otherwise hard."""

    def make(n, dtype, seed=0):
        rng = np.random.default_rng(seed)
        t = torch.from_numpy(rng.normal(0, 0.1, n).astype(np.float32)).to(dtype)
        patterns, sign = _HARD[dtype]
        hard = np.array(patterns + [p | 1 << sign for p in patterns], _STORAGE[dtype])
        where = torch.from_numpy(rng.random(n) < 0.25)
        t[where] = torch.from_numpy(rng.choice(hard, n)).view(dtype)[where]
        return t

    return make


@pytest.fixture(scope="session")
def by_reference():
    """(test, its parameters but `isa`, number of the call in it) -> what the reference backend makes of the call: once
    for all instruction sets, for the reference takes most of the time."""
    return {}


@pytest.fixture
def twin(bits, by_reference, request):
    """twin(call, *tensors): runs call(*clones) on the cpu and on the reference backend; asserts equal bits of all
    clones and equal results. The n-th call of a test must be the same for every `isa`.

    A clone keeps the storage offset and the strides of its tensor. Returns the clones.
    """
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    test = request.node.path, request.node.originalname, str({k: v for k, v in parameters.items() if k != "isa"})
    numbers = itertools.count()

    def clone(tensor):
        if tensor is None:
            return None
        storage = tensor.untyped_storage().clone()
        return torch.empty(0, dtype=tensor.dtype).set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())

    def run_on(backend, call, tensors):
        clones = [clone(t) for t in tensors]
        with es_kernels.backend(backend):
            return clones, call(*clones)

    def run(call, *tensors):
        key = *test, next(numbers)
        if key not in by_reference:
            by_reference[key] = run_on("reference", call, tensors)
        clones, result = run_on("cpu", call, tensors)
        expected, expected_result = by_reference[key]
        for ours, theirs in zip(clones, expected, strict=True):
            if ours is not None:
                # The whole storage: memory around the tensor must not be touched either.
                ours, theirs = (torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()) for t in (ours, theirs))
                assert torch.equal(bits(ours), bits(theirs))
        if isinstance(result, int):
            assert result == expected_result
        return clones

    return run


@pytest.fixture(scope="session")
def pack_of():
    """pack_of(*tensors, segments=None, base=(), anchor=(), matrices=False): the Pack of tensors that are named t0, t1,
    ..."""

    def pack(*tensors, segments=None, base=(), anchor=(), matrices=False):
        names = tuple(f"t{i}" for i in range(len(tensors)))
        return Layout.intern(names, None, segments).pack(tensors, base, anchor, matrices)

    return pack


def _isas():
    if native.why_not("cpu"):
        return []
    return cpu.isas()


@pytest.fixture(scope="session")
def cuda_library(made_once):
    """csrc/cuda.cu as a library that runs on the CPU: cuda_on_cpu/cuda_runtime.h."""
    compiler = shlex.split(os.environ.get("CXX") or "g++")  # or "ccache g++"
    if not shutil.which(compiler[0]) or not (ROOT / "csrc").exists():
        pytest.skip("needs g++ and csrc/")
    flags = "-std=c++17 -O2 -fPIC -shared -fvisibility=hidden -fno-strict-aliasing -ffp-contract=off -Wno-psabi".split()
    command = [*compiler, *flags, "-x", "c++", ROOT / "csrc/cuda.cu", "-I", ROOT / "tests/es_kernels/cuda_on_cpu"]

    def make(folder):
        subprocess.run([*command, "-o", folder / "libes_cuda.so"], check=True)

    return ctypes.CDLL(str(made_once("cuda_on_cpu", make) / "libes_cuda.so"))


@contextlib.contextmanager
def serving(compiled, on_device, launching=lambda *ranges: contextlib.nullcontext()):
    """Calls of the cpu backend go to the cuda backend over the library `compiled`; seeds, coefficients and rounding
    seeds as if they were in device memory, or (while they fit) as the kernel's parameters. A call runs within
    launching(segments, n_segments, *others): what it may touch."""

    def add_noise(
        segments,
        n_segments,
        n_units,
        seeds,
        _,
        coefs,
        __,
        n_seeds,
        decay,
        rounding_seed,
        ___,
        noise_rank,
        device,
        stream,
    ):
        there = on_device or n_seeds > cuda._HOST_SEEDS
        others = [(seeds, 8 * n_seeds, False), (coefs, 4 * n_seeds, False)] if there else []
        if rounding_seed and on_device:
            others.append((rounding_seed, 8, False))
        with launching(segments, n_segments, *others):
            return library.es_cuda_add_noise(
                segments,
                n_segments,
                n_units,
                seeds,
                there,
                coefs,
                there,
                n_seeds,
                decay,
                rounding_seed,
                on_device,
                noise_rank,
                0,
                stream,
            )

    def factors(table, n_factors, n_units, seeds, _, n_seeds, out, dtype, device, stream):
        there, size = on_device or n_seeds > cuda._HOST_SEEDS, SIZES[dtype]
        rows = np.frombuffer((ctypes.c_char * (n_factors * FACTOR.itemsize)).from_address(table), FACTOR)
        others = [(out + n_seeds * int(f["offset"]) * size, n_seeds * int(f["count"]) * size, True) for f in rows]
        others += [(table, rows.nbytes, False)] + [(seeds, 8 * n_seeds, False)] * there
        with launching(table, 0, *others):
            return library.es_cuda_factors(table, n_factors, n_units, seeds, there, n_seeds, out, dtype, 0, stream)

    def fingerprint(segments, n_segments, n_units, result, device, stream):
        with launching(segments, n_segments, (result, 8, True)):
            return library.es_cuda_fingerprint(segments, n_segments, n_units, result, 0, stream)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "load", lambda name: compiled)
        library = cuda._library.__wrapped__()
        served = types.SimpleNamespace(
            es_cuda_add_noise=add_noise,
            es_cuda_factors=factors,
            es_cuda_fingerprint=fingerprint,
            es_cuda_error=library.es_cuda_error,
        )
        patch.setattr(cuda, "_library", lambda: served)
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        patch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=None))
        patch.setattr(cpu, "add_noise_", cuda.add_noise_)
        patch.setattr(cpu, "factors", cuda.factors)
        patch.setattr(cpu, "fingerprint", cuda.fingerprint)
        yield


@pytest.fixture
def cuda_on_cpu(cuda_library):
    """with cuda_on_cpu(on_device): the kernels of csrc/cuda.cu, run on the CPU, serve it: see `serving`."""
    return functools.partial(serving, cuda_library)


# ---- what nvcc and Triton emit, interpreted: ptx/ ----


@pytest.fixture(scope="session")
def cuda_ptx_library(made_once):
    if not ptx.nvcc() or not (ROOT / "csrc").exists():
        pytest.skip("needs nvcc and csrc/")
    return ptx.Cuda(made_once("cuda_ptx", ptx.compile_cuda))


@pytest.fixture
def cuda_ptx(cuda_ptx_library):
    """with cuda_ptx(on_device): as cuda_on_cpu, by the PTX that nvcc makes of csrc/cuda.cu."""
    return lambda on_device: serving(cuda_ptx_library.library, on_device, cuda_ptx_library.launching)


@pytest.fixture(scope="session")
def triton_ptx_backend():
    if ptx.triton is None:
        pytest.skip("needs triton")
    return ptx.Triton()


@pytest.fixture
def triton_ptx(triton_ptx_backend):
    """with triton_ptx(): calls of the cpu backend go to the triton backend, run by the PTX that Triton makes of its
    kernels. Seeds are always on the device."""

    @contextlib.contextmanager
    def use(on_device=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu, "add_noise_", triton_ptx_backend.backend.add_noise_)
            patch.setattr(cpu, "fingerprint", triton_ptx_backend.backend.fingerprint)
            patch.setattr(cpu, "factors", triton_ptx_backend.backend.factors, raising=False)
            yield

    return use


# ---- NEON, emulated: aarch64/ ----


@pytest.fixture(scope="session")
def aarch64_library(made_once):
    for program in (emulator.COMPILER, emulator.QEMU):
        assert shutil.which(program), f"no {program}: `make test-aarch64` installs it"
    library = emulator.Library(made_once("aarch64", emulator.compile_driver))
    yield library
    library.close()


@pytest.fixture
def aarch64(aarch64_library, monkeypatch):
    """Calls of the cpu backend go to libes_cpu.so for aarch64, which qemu-user runs."""
    monkeypatch.setattr(cpu, "_library", lambda: aarch64_library)


# The instruction sets of the cpu backend. Those of another architecture are emulated, by `make test-aarch64`.
NEON_HERE = os.uname().machine == "aarch64"
ISAS = (
    *(("avx512", "avx2", "baseline") if not NEON_HERE else ()),
    pytest.param("neon", marks=[pytest.mark.aarch64] * (not NEON_HERE)),
)
# Kernels for a GPU that serve calls of the cpu backend: fixture, seeds on the device.
GPU_ON_CPU = {
    "cuda.cu": ("cuda_on_cpu", False),
    "cuda.cu, seeds on the device": ("cuda_on_cpu", True),
    "nvcc's PTX": ("cuda_ptx", False),
    "nvcc's PTX, seeds on the device": ("cuda_ptx", True),
    "Triton's PTX": ("triton_ptx", True),
}


@pytest.fixture(
    params=(*ISAS, *(pytest.param(name, marks=[pytest.mark.slow] * ("PTX" in name)) for name in GPU_ON_CPU))
)
def isa(request, monkeypatch):
    """Every instruction set of the cpu backend in turn, and the kernels for GPUs run on the CPU; what this processor
    lacks is skipped."""
    if request.param in GPU_ON_CPU:
        fixture, on_device = GPU_ON_CPU[request.param]
        with request.getfixturevalue(fixture)(on_device):
            yield request.param
        return
    if request.param == "neon" and not NEON_HERE:
        request.getfixturevalue("aarch64")
        yield request.param
        return
    if native.why_not("cpu"):
        pytest.skip(native.why_not("cpu"))
    if request.param not in _isas():
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setenv("ES_KERNELS_ISA", request.param)
    yield request.param


@pytest.fixture
def threads():
    """with threads(n): torch uses n threads, and so do we."""

    @contextlib.contextmanager
    def use(n):
        before = torch.get_num_threads()
        torch.set_num_threads(n)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    return use
