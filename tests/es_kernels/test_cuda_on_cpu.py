"""Contract under test: the kernels of csrc/cuda.cu, run on the CPU (cuda_on_cpu/cuda_runtime.h), give the cpu backend's
bits on tables that several blocks of threads walk in several tiles each, from first segment to last, over one row or
many; a small table is spread over the whole device; the caller's current device is changed only where it must be.
Marked slow, the PTX of these kernels and of Triton's does so too (ptx/).

Dtypes, masks, strides, far indices and roundings are in test_add_noise.py and test_fingerprint.py, which run these
kernels as one more instruction set. What neither shows is in tests/gpu.
"""

import contextlib
import ctypes

import pytest
import torch

import es_kernels
from es_kernels import ParamTable, Segment, add_noise_, native, noise
from es_kernels.backends import cuda

from .conftest import GPU_ON_CPU

TILE = 8192 * 8  # values: kLargestTile of cuda.cu; the device has 3 blocks
F32, BF16, F16 = DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = [noise.member_seed(1, 0, k) for k in range(300)]
CALLS = [(0, {}), (1, {}), (1, {"rounding": "stochastic", "rounding_seed": 5}), (2, {}), (3, {"decay": 0.1}), (130, {})]

if native.why_not("cpu"):
    pytest.skip(native.why_not("cpu"), allow_module_level=True)


KERNELS = [name if "PTX" not in name else pytest.param(name, marks=pytest.mark.slow) for name in GPU_ON_CPU]


class State(ctypes.Structure):
    """struct CudaOnCpu: what the pretended CUDA has, and what was called."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in ("devices", "multiprocessors", "current_device", "set_device_calls", "device_of_launch")
    ]
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
    yield (
        "many small tensors in a tile, then a tile's end inside a large one",
        [*range(1, 60), 4096, 2 * TILE, 3, TILE, 8, 5 * TILE - 1],
    )
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
        base = (
            None
            if n_seeds
            else {name: torch.randn(t.shape, generator=torch.Generator().manual_seed(7)) for name, t in ours.items()}
        )
        call = (SEEDS[:n_seeds], [0.01 * (i + 1) for i in range(n_seeds)], base)
        add_noise_(theirs, *call, **options)
        expected = es_kernels.fingerprint(theirs)
        with kernels(on_device):
            add_noise_(ours, *call, **options)
            assert es_kernels.fingerprint(ours) == expected, what
        for name in ours:
            assert torch.equal(bits(ours[name]), bits(theirs[name])), (what, name)


# ---- many rows ----

# Units a row: 1, as few as threads step over many rows; around the 256 threads of a block; more than several trips.
SHARDS = [(700, 8), (90, 24), (40, 224), (9, 2040), (9, 2048), (9, 2056), (3, 8 * 592)]


@pytest.mark.parametrize("base_dtype", (None, *DTYPES), ids=str)
@pytest.mark.parametrize("n_seeds, options", CALLS[:5])
@pytest.mark.parametrize("kernels", KERNELS[::2])
def test_shards_of_many_rows(kernels, weights, bits, n_seeds, options, base_dtype, request):
    """Row-parallel: rows of whole aligned blocks, each the middle of a longer row of the whole; in memory of its own or
    between other columns."""
    fixture, on_device = GPU_ON_CPU[kernels]
    kernels = request.getfixturevalue(fixture)
    start = 8 * (2**32 - 300)  # the block's number crosses 2^32 within a segment

    def table(tensors):
        def segments(i, t):
            return [
                Segment(
                    f"w{i}",
                    t.shape[0],
                    t.shape[1],
                    row_stride=t.stride(0),
                    first=start + 16,
                    index_stride=4 * t.shape[1],
                )
            ]

        return ParamTable([(f"w{i}", t, segments(i, t)) for i, t in enumerate(tensors)])

    def shards(dtypes, seed):
        for i, (rows, cols) in enumerate(SHARDS):
            for gap in (0, 64):
                whole = weights(rows * (cols + gap), dtypes[i % len(dtypes)], seed + i).view(rows, cols + gap)
                yield whole[:, gap // 2 : gap // 2 + cols]

    def clone(t):
        return torch.empty(0, dtype=t.dtype).set_(t.untyped_storage().clone(), t.storage_offset(), t.shape, t.stride())

    ours = list(shards(DTYPES, 0))
    theirs = [clone(t) for t in ours]
    bases = [clone(t).to(base_dtype) if base_dtype else None for t in ours]
    bases = [
        b if b is None else torch.empty_strided(t.shape, t.stride(), dtype=b.dtype).copy_(b)
        for b, t in zip(bases, ours, strict=True)
    ]
    for t in ours:
        pack = table([t]).layout.pack([t])
        assert pack.segments["vector_path"].all() and pack.segments["rows"].max() == len(t), (
            "this is to be about whole aligned blocks in rows"
        )
    call = (SEEDS[:n_seeds], [0.01 * (i + 1) for i in range(n_seeds)], table(bases) if base_dtype else None)
    add_noise_(table(theirs), *call, **options)
    expected = es_kernels.fingerprint(table(theirs))
    with kernels(on_device):
        add_noise_(table(ours), *call, **options)
        assert es_kernels.fingerprint(table(ours)) == expected
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(
            bits(torch.empty(0, dtype=a.dtype).set_(a.untyped_storage())),
            bits(torch.empty(0, dtype=b.dtype).set_(b.untyped_storage())),
        )


@pytest.mark.parametrize("base_stride", (224, 500))
def test_rows_may_be_further_apart_in_one_tensor_than_in_the_other(cuda_on_cpu, weights, bits, base_stride):
    results = []
    for context in (contextlib.nullcontext(), cuda_on_cpu(False)):
        out, base = (
            weights(40 * 304, BF16).view(40, 304)[:, 16:240],
            weights(40 * base_stride, F32, 1).view(40, base_stride)[:, :224],
        )
        pack = ParamTable({"w": out}).layout.pack([out], [base])
        assert pack.segments[["rows", "vector_path"]].tolist() == [(40, 1)]
        with context:
            add_noise_({"w": out}, 1, 0.1, {"w": base})
        results.append(bits(out))
    assert torch.equal(*results)


@pytest.mark.parametrize("index_stride", ((1 << 35) - 8, 1 << 35, 5 << 40))
def test_rows_may_be_further_apart_in_the_stream_than_32_bits_count(cuda_on_cpu, weights, bits, index_stride):
    results = []
    for context in (contextlib.nullcontext(), cuda_on_cpu(False)):
        tensor = weights(3 * 64, BF16).view(3, 64)
        table = ParamTable([("w", tensor, [Segment("w", 3, 64, first=8, index_stride=index_stride)])])
        with context:
            add_noise_(table, 1, 0.1)
            results.append((es_kernels.fingerprint(table), bits(tensor)))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


# ---- tiles ----


@pytest.mark.parametrize("n_seeds", (0, 1, 2, 3))
def test_a_small_table_is_spread_over_the_whole_device(cuda_on_cpu, state, n_seeds):
    """2^20 values on 132 multiprocessors: with tiles of 65536 values 16 of them would work."""
    t, grids, found = torch.empty(1 << 20, dtype=BF16), {}, set()
    with cuda_on_cpu(False):
        for state.multiprocessors in (1, 3, 132):
            add_noise_(t.zero_(), SEEDS[:n_seeds], [0.5] * n_seeds, name="w")
            grids[state.multiprocessors] = state.grid_of_launch
            found.add(es_kernels.fingerprint({"w": t}))
            assert state.grid_of_launch == grids[state.multiprocessors]
    assert grids == {1: 1, 3: 3, 132: 128} and len(found) == 1


def test_tiles_are_whole_rounds_and_at_most_8192_units(cuda_on_cpu, state):
    with cuda_on_cpu(False):
        for values, grid in ((8, 1), (2 * 4096, 2), (2 * 4096 + 1, 3), (3 * TILE, 3), (3 * TILE + 8, 3), (5 * TILE, 3)):
            add_noise_(torch.zeros(values), 1, 1.0, name="w")
            assert state.grid_of_launch == grid, values


# ---- the current device ----


def launch(library, device, fingerprint=False):
    tensor = torch.zeros(100)
    pack = ParamTable({"w": tensor}).layout.pack([tensor])
    seeds, coefs, result = (ctypes.c_uint64 * 1)(1), (ctypes.c_float * 1)(1.0), ctypes.c_uint64()
    segments = pack.segments.ctypes.data
    if fingerprint:
        return library.es_cuda_fingerprint(segments, len(pack.segments), pack.units, ctypes.byref(result), device, None)
    return library.es_cuda_add_noise(
        segments, len(pack.segments), pack.units, seeds, 0, coefs, 0, 1, 0.0, None, 0, 0, device, None
    )


@pytest.mark.parametrize("fingerprint", (False, True))
@pytest.mark.parametrize("current, device, calls", [(0, 0, 0), (1, 1, 0), (0, 1, 2), (2, 1, 2)])
def test_the_current_device_is_touched_only_to_change_it(cuda_library, state, current, device, calls, fingerprint):
    """cudaSetDevice makes a context: to go "back" to a device that was current all the time would cost GPU 0 500 MB for
    each process."""
    state.devices, state.current_device = 3, current
    assert launch(cuda.declared(cuda_library), device, fingerprint) == 0
    assert (state.device_of_launch, state.current_device, state.set_device_calls) == (device, current, calls)


def test_a_device_that_is_not_there_changes_nothing(cuda_library, state):
    state.device_of_launch = -1
    assert launch(cuda.declared(cuda_library), 5) == 101
    assert (state.current_device, state.set_device_calls, state.device_of_launch) == (0, 1, -1)
