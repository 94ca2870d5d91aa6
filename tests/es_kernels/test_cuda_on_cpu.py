"""Contract under test: the kernels of csrc/cuda.cu, run on the CPU (cuda_on_cpu/cuda_runtime.h), give the cpu backend's bits on tables that several
blocks of threads walk in several tiles each, from first segment to last. Marked slow, the PTX of these kernels and of Triton's does so too (ptx/).

Dtypes, masks, strides, far indices and roundings are in test_add_noise.py and test_fingerprint.py, which run these kernels as one more instruction set.
What neither shows is in tests/gpu.
"""

import pytest
import torch

import es_kernels
from es_kernels import add_noise_, native, noise

from .conftest import GPU_ON_CPU

TILE = 8192 * 8  # values: kTile of cuda.cu; the device has 3 blocks
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = [noise.member_seed(1, 0, k) for k in range(300)]

if native.why_not("cpu"):
    pytest.skip(native.why_not("cpu"), allow_module_level=True)


KERNELS = [name if "PTX" not in name else pytest.param(name, marks=pytest.mark.slow) for name in GPU_ON_CPU]


def tables(weights):
    """Sizes of tensors, each in turn of another dtype."""
    yield "one tensor of eight tiles and a bit", [8 * TILE + 11]
    yield "exactly three tiles", [3 * TILE]
    yield "many small tensors in a tile, then a tile's end inside a large one", [*range(1, 60), 4096, 2 * TILE, 3, TILE, 8, 5 * TILE - 1]
    yield "tensors that end where tiles do", [TILE, TILE, 2 * TILE, TILE]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("n_seeds, options", [(0, {}), (1, {}), (1, {"rounding": "stochastic", "rounding_seed": 5}), (2, {}), (3, {"decay": 0.1}), (130, {})])
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
