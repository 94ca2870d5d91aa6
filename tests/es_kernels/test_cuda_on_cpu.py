"""Contract under test: the kernels of csrc/cuda.cu, run on the CPU (cuda_on_cpu/cuda_runtime.h), give the cpu backend's bits on tables that several
blocks of threads walk in several tiles each, from first segment to last; the
caller's current device is changed only where it must be. Marked slow, the PTX of these kernels and of Triton's does so too (ptx/).

Dtypes, masks, strides, far indices and roundings are in test_add_noise.py and test_fingerprint.py, which run these kernels as one more instruction set.
What neither shows is in tests/gpu.
"""

import ctypes

import pytest
import torch

import es_kernels
from es_kernels import ParamTable, add_noise_, native, noise
from es_kernels.backends import cuda

from .conftest import GPU_ON_CPU

TILE = 8192 * 8  # values: kTile of cuda.cu; the device has 3 blocks
F32, BF16, F16 = DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = [noise.member_seed(1, 0, k) for k in range(300)]
CALLS = [(0, {}), (1, {}), (1, {"rounding": "stochastic", "rounding_seed": 5}), (2, {}), (3, {"decay": 0.1}), (130, {})]

if native.why_not("cpu"):
    pytest.skip(native.why_not("cpu"), allow_module_level=True)


KERNELS = [name if "PTX" not in name else pytest.param(name, marks=pytest.mark.slow) for name in GPU_ON_CPU]


class State(ctypes.Structure):
    """struct CudaOnCpu: what the pretended CUDA has, and what was called."""

    _fields_ = [(name, ctypes.c_int) for name in ("devices", "multiprocessors", "current_device", "set_device_calls", "device_of_launch")]
    _fields_ += [("grid_of_launch", ctypes.c_int64)]


@pytest.fixture
def state(cuda_library):
    found = State.in_dll(cuda_library, "cuda_on_cpu_state")
    before = bytes(found)
    yield found
    ctypes.memmove(ctypes.byref(found), before, len(before))


def tables(weights):
    """Sizes of tensors, each in turn of another dtype."""
    yield "one tensor of eight tiles and a bit", [8 * TILE + 11]
    yield "exactly three tiles", [3 * TILE]
    yield "many small tensors in a tile, then a tile's end inside a large one", [*range(1, 60), 4096, 2 * TILE, 3, TILE, 8, 5 * TILE - 1]
    yield "tensors that end where tiles do", [TILE, TILE, 2 * TILE, TILE]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("n_seeds, options", CALLS)
def test_tables_of_many_tiles(kernels, weights, bits, n_seeds, options, request):
    fixture, on_device = GPU_ON_CPU[kernels]
    kernels = request.getfixturevalue(fixture)
    for what, sizes in tables(weights):
        if n_seeds > 100:
            sizes = [n // 50 + 1 for n in sizes]
        ours = {f"w{i}": weights(n, DTYPES[i % 3], i) for i, n in enumerate(sizes)}
        theirs = {name: t.clone() for name, t in ours.items()}
        base = None if n_seeds else {name: torch.randn(t.shape, generator=torch.Generator().manual_seed(7)) for name, t in ours.items()}
        call = (SEEDS[:n_seeds], [0.01 * (i + 1) for i in range(n_seeds)], base)
        add_noise_(theirs, *call, **options)
        expected = es_kernels.fingerprint(theirs)
        with kernels(on_device):
            add_noise_(ours, *call, **options)
            assert es_kernels.fingerprint(ours) == expected, what
        for name in ours:
            assert torch.equal(bits(ours[name]), bits(theirs[name])), (what, name)


# ---- the current device ----


def launch(library, device, fingerprint=False):
    pack = ParamTable({"w": torch.zeros(100)}).layout.pack([torch.zeros(100)])
    seeds, coefs, result = (ctypes.c_uint64 * 1)(1), (ctypes.c_float * 1)(1.0), ctypes.c_uint64()
    segments = pack.segments.ctypes.data
    if fingerprint:
        return library.es_cuda_fingerprint(segments, len(pack.segments), pack.units, ctypes.byref(result), device, None)
    return library.es_cuda_add_noise(segments, len(pack.segments), pack.units, seeds, 0, coefs, 0, 1, 0.0, None, 0, device, None)


@pytest.mark.parametrize("fingerprint", (False, True))
@pytest.mark.parametrize("current, device, calls", [(0, 0, 0), (1, 1, 0), (0, 1, 2), (2, 1, 2)])
def test_the_current_device_is_touched_only_to_change_it(cuda_library, state, current, device, calls, fingerprint):
    """cudaSetDevice makes a context: to go "back" to a device that was current all the time would cost GPU 0 500 MB for each process."""
    state.devices, state.current_device = 3, current
    assert launch(cuda.declared(cuda_library), device, fingerprint) == 0
    assert (state.device_of_launch, state.current_device, state.set_device_calls) == (device, current, calls)


def test_a_device_that_is_not_there_changes_nothing(cuda_library, state):
    state.device_of_launch = -1
    assert launch(cuda.declared(cuda_library), 5) == 101
    assert (state.current_device, state.set_device_calls, state.device_of_launch) == (0, 1, -1)
