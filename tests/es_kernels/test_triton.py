"""Contract: the Triton kernels equal the reference on every bit, for every format, size, alignment and shape of
segment; they compile for every architecture that we name, without spills, with 128-bit loads and stores, and nothing
but the fma's that we wrote.

Where there is a GPU the kernels run on it, else in Triton's interpreter."""

import json
import os
import pathlib
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

import es_kernels
from es_kernels import ParamTable, Segment, noise

triton_backend = pytest.importorskip("es_kernels.backends.triton")
pytestmark = pytest.mark.skipif(triton_backend.triton is None, reason="triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, BF16, F16 = FORMATS = torch.float32, torch.bfloat16, torch.float16
STOCHASTIC = {"rounding": "stochastic", "rounding_seed": 0xFEDCBA9876543210}
SEEDS = [12345, 0xFFFFFFFFFFFFFFFF, 1 << 63, 7]


@pytest.fixture(autouse=True)
def _exact(request):
    if DEVICE == "cpu":
        request.getfixturevalue("exact_interpreter")


def raw(tensor):
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16).cpu()


def both(make, seeds, coefs, **options):
    """Runs the operation on make() by Triton and by the reference and compares bits and fingerprints. make: () -> out,
    base, anchor as mappings name -> (tensor, segments or None), base and anchor may be None. Returns the reference's
    out."""
    results = []
    for name, device in (("triton", DEVICE), ("reference", "cpu")):
        tables = [
            None if named is None else ParamTable((k, place(t, device), s) for k, (t, s) in named.items())
            for named in make()
        ]
        with es_kernels.backend(name):
            out, base, anchor = tables
            before = es_kernels.fingerprint(out)
            es_kernels.add_noise_(out, seeds, coefs, base, anchor=anchor, **options)
            results.append((before, es_kernels.fingerprint(out), out))
    (before, after, out), (expected_before, expected_after, expected) = results
    for name, a, b in zip(out.names, out.tensors, expected.tensors, strict=True):
        where = (raw(a) != raw(b)).nonzero()
        assert not len(where), f"{name}: {len(where)} of {a.numel()} differ, first at {where[0].tolist()}"
    assert (before, after) == (expected_before, expected_after)
    return expected


def place(tensor, device):
    """A copy on the device with the same strides and the same offset to 16 bytes."""
    storage = torch.empty(
        tensor.untyped_storage().nbytes() // tensor.element_size() + 16, dtype=tensor.dtype, device=device
    )
    shift = (tensor.data_ptr() - storage.data_ptr()) % 16 // tensor.element_size()
    copy = storage[shift:].as_strided(tensor.shape, tensor.stride())
    return copy.copy_(tensor)


def random(shape, dtype, seed=0, offset=0):
    shape = (shape,) if isinstance(shape, int) else shape
    n = int(np.prod(shape))
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n + offset, generator=generator).mul(0.05).to(dtype)[offset:].view(shape)


@pytest.mark.parametrize("base_format", [None, *FORMATS], ids=str)
@pytest.mark.parametrize("out_format", FORMATS, ids=str)
def test_sizes_and_formats(out_format, base_format):
    def make():
        sizes = [0, 1, 7, 8, 9, 33, 3000]
        out = {f"w{n}": (random(n, out_format, n), None) for n in sizes}
        return out, base_format and {f"w{n}": (random(n, base_format, n + 100), None) for n in sizes}, None

    both(make, SEEDS[:2], [1e-3, -0.5])
    both(make, SEEDS[2], 1e-3, **STOCHASTIC)


@pytest.mark.parametrize("options", [{}, STOCHASTIC], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("n", [0, 1, 2, 30])
def test_number_of_seeds(n, options):
    def make():
        return {f"w{i}": (random(203, dtype, i), None) for i, dtype in enumerate(FORMATS)}, None, None

    both(make, [noise.member_seed(1, 2, i) for i in range(n)], np.linspace(-1, 1, n).tolist(), **options)


def test_seeds_as_tensors_and_zero_coefficients():
    def make():
        return {"w": (-torch.zeros(40), None)}, None, None

    seeds, coefs = torch.tensor([1, -2, 3, 4])[::2], torch.tensor([0.0, 9.0, -0.0, 9.0])[::2]
    both(make, seeds, coefs)
    both(make, seeds[:1], coefs[:1], rounding="stochastic", rounding_seed=seeds[:1])
    both(make, seeds[:1], coefs[1:])  # -0 + -0 * noise keeps its sign only without an accumulator


@pytest.mark.parametrize("options", [{}, STOCHASTIC], ids=["nearest", "stochastic"])
def test_decay(options):
    def make():
        formats = list(zip(FORMATS, (BF16, F16, F32), (F16, F32, BF16), strict=True))
        out, base, anchor = (
            {f"w{i}": (random(150, f[k], 10 * k + i), None) for i, f in enumerate(formats)} for k in range(3)
        )
        return out, base, anchor

    both(make, SEEDS[:2], [0.1, -0.2], decay=0.01, **options)
    both(lambda: (make()[0], None, None), SEEDS[:1], [0.1], decay=0.3, **options)
    both(lambda: (make()[0], None, make()[2]), [], [], decay=1e-3, **options)


def float_patterns():
    """Float32 bits: every sign and exponent, fractions at the ends and around the ties of both 16-bit formats."""
    exponent, high, low = np.ix_(
        np.arange(512) << 7,
        (0, 1, 2, 0x3F, 0x40, 0x7F),
        (0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF),
    )
    return ((exponent | high) << 16 | low).ravel().astype(np.uint32)


@pytest.mark.parametrize("options", [{}, STOCHASTIC], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("out_format", FORMATS, ids=str)
def test_every_rounding(out_format, options):
    """Restores: all exponents and signs, ties, overflow, subnormals, infinities, quiet and signalling NaNs; by the
    vector path (an even offset) and element by element (an odd one)."""
    bits = torch.from_numpy(float_patterns().view(np.int32))

    def make():
        base = {"vector": (bits.view(F32), None), "element": (torch.cat([bits[:1], bits[::13]]).view(F32)[1:], None)}
        return {name: (torch.zeros(t.shape, dtype=out_format), None) for name, (t, _) in base.items()}, base, None

    both(make, [], [], **options)


@pytest.mark.parametrize("base_format", [BF16, F16], ids=str)
def test_every_16_bit_value(base_format):
    def make():
        base = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(base_format)
        return {"w": (base, None)}, None, None

    both(make, SEEDS[:1], [1e-4])


def test_ties_of_fma():
    """b + c * noise so close to the middle of two float32 that float64 takes it for the middle."""
    normals = noise.normal(5, noise.stream_id("w"), np.arange(4096)).astype(np.float64)
    scaled = np.float32(2.0**-10 / normals)
    excess = scaled.astype(np.float64) * normals * 2.0**10 - 1
    for below, sign in ((False, 1), (True, -1)):
        close = np.flatnonzero((excess * sign > 0) & (np.abs(excess) < 2.0**-30))
        assert len(close) >= 4
        for i in close[:4]:
            b = np.float32(2.0**14) + np.float32(2.0**-9) * (1 if below else 2)  # tie to even goes the other way
            exact = noise.fma(scaled[i], np.float32(normals[i]), b)
            assert exact != np.float32(float(b) + float(scaled[i]) * normals[i])
            expected = both(lambda b=b: ({"w": (torch.full((4096,), float(b)), None)}, None, None), 5, float(scaled[i]))
            assert expected.tensors[0][i].item() == exact
            if DEVICE == "cpu" and es_kernels.backends.unavailable("cpu", torch.device("cpu")) is None:
                table = ParamTable({"w": torch.full((4096,), float(b))})
                with es_kernels.backend("cpu"):
                    es_kernels.add_noise_(table, 5, float(scaled[i]))
                assert torch.equal(table.tensors[0], expected.tensors[0])


@pytest.mark.parametrize("shift", [1, 3, 4, 8])
def test_offsets_in_storage(shift):
    def make():
        return {"w": (random(90, BF16, 1, offset=shift), None)}, {"w": (random(90, F32, 2, offset=1), None)}, None

    both(make, SEEDS[:1], [0.1])
    both(lambda: (make()[0], None, None), SEEDS[:1], [0.1], **STOCHASTIC)


@pytest.mark.parametrize("columns", [1, 5, 8, 24, 30])
def test_rows_with_gaps(columns):
    """Two-dimensional memory: a view with gaps, and a shard whose rows are pieces of longer rows of the whole."""

    def make():
        gaps = random((9, 40), BF16, 3)[:, :columns]
        shard = random((6, columns), F32, 4)
        return (
            {
                "gaps": (gaps, None),
                "shard": (shard, [Segment("whole", 6, columns, first=16, index_stride=4 * columns)]),
            },
            None,
            None,
        )

    both(make, SEEDS[:2], [0.1, 0.2])
    both(make, SEEDS[:1], [0.1], **STOCHASTIC)


def test_fused_tensor():
    def make():
        qkv = random((48, 16), F16, 5)
        parts = [Segment(f"{name}.weight", 16, 16, offset=256 * i) for i, name in enumerate("qkv")]
        return {"qkv": (qkv, parts)}, {"qkv": (random((48, 16), F32, 6), parts)}, None

    both(make, SEEDS[:1], [0.1])


@pytest.mark.parametrize("first", [(1 << 35) - 40, (1 << 35) - 37, (1 << 32) - 8, (1 << 64) - 100, (1 << 61) - 9, 5])
def test_large_indices(first):
    """Block numbers past 2^32, and the one where the low half wraps."""

    def make():
        one_row = [Segment("a", 1, 100, first=first)]
        rows = [Segment("b", 4, 20, first=first - 40 if first > 40 else first, index_stride=24)]
        return {"a": (random(100, F32, 1), one_row), "b": (random((4, 20), BF16, 2), rows)}, None, None

    both(make, SEEDS[:1], [0.1], **STOCHASTIC)


def test_many_programs(monkeypatch):
    """Segments that begin, end and lie within the range of a program."""
    monkeypatch.setattr(triton_backend, "_UNITS", 16)
    if DEVICE == "cuda":
        monkeypatch.setattr(triton_backend, "_WARPS", 1)

    def make():
        sizes = [1000, 3, 8, 200, 129, 4, 640, 1, 128, 128]
        return {f"w{i}": (random(n, FORMATS[i % 3], i), None) for i, n in enumerate(sizes)}, None, None

    both(make, SEEDS, [0.1, 0.2, 0.3, 0.4])


def test_a_small_table_is_spread_over_the_whole_device(monkeypatch):
    """2^20 values on 132 processors: steps of 2048 values, one for a program."""
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(multi_processor_count=132)
    )
    for values, programs in ((8, 1), (1 << 20, 512), (1 << 30, 8323)):
        pack = types.SimpleNamespace(device=torch.device("cuda"), units=values // 8)
        found, per_program = triton_backend._split(pack, 256)
        assert found == programs and (found - 1) * per_program < pack.units <= found * per_program


@pytest.mark.parametrize("options", [{}, STOCHASTIC, {"decay": 0.01}], ids=["nearest", "stochastic", "decay"])
@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank(rank, options):
    """Matrices of several tiles, with vectors and without, of every format, beside a tensor that is none."""
    shapes = [(7, 9), (3, 257), (130, 136), (33,)]

    def make():
        out, base, anchor = (
            {f"w{i}": (random(shape, FORMATS[(i + k) % 3], 10 * k + i), None) for i, shape in enumerate(shapes)}
            for k in range(3)
        )
        return out, base, anchor if "decay" in options else None

    for n in (0, 1, 3):
        both(make, SEEDS[:n], [0.1, -0.2, 0.3][:n], noise_rank=rank, **options)


@pytest.mark.parametrize("n", [9, 10, 18])
def test_low_rank_of_many_seeds(n):
    """Of which rank 1 draws eight at a time, where a tile's factors are whole noise blocks: not in `shifted`."""

    def make():
        shifted, aligned = (
            [Segment(name, 24, 16, first=48 * row, index_stride=48, width=48)]
            for name, row in (("shifted", 3), ("aligned", 8))
        )
        return (
            {
                "shifted": (random((24, 16), F32, 1), shifted),
                "aligned": (random((24, 16), BF16, 2), aligned),
                "whole": (random((130, 136), F32, 3), None),
            },
            None,
            None,
        )

    both(make, [noise.member_seed(1, 2, i) for i in range(n)], np.linspace(-1, 1, n).tolist(), noise_rank=1)


@pytest.mark.parametrize("first", [0, 8, 1029, (1 << 35) - 77])
def test_low_rank_of_parts(first):
    """Runs and rectangles anywhere in a matrix, whose rows are not those of the memory."""

    def make():
        runs = [Segment("x", 1, n, offset=at, first=first + at, width=48) for at, n in ((0, 130), (130, 70))]
        rows = [Segment("y", 9, 24, row_stride=40, first=first // 48 * 48 + 8, index_stride=96, width=48)]
        return {"x": (random(200, BF16, 1), runs), "y": (random((9, 40), F32, 2), rows)}, None, None

    both(make, SEEDS[:2], [0.1, 0.2], noise_rank=1)
    both(make, SEEDS[:1], [0.1], noise_rank=2, **STOCHASTIC)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_factors(dtype):
    matrices = {"a": (7, 9), "b": (300, 1), "none": (0, 4), "c": (2, 1000)}
    for rank, seeds in ((1, SEEDS), (3, SEEDS[:1])):
        with es_kernels.backend("triton"):
            drawn = es_kernels.factors(matrices, seeds, rank, dtype=dtype, device=DEVICE)
        with es_kernels.backend("reference"):
            expected = es_kernels.factors(matrices, seeds, rank, dtype=dtype)
        for name in matrices:
            assert all(torch.equal(raw(a), raw(b)) for a, b in zip(drawn[name], expected[name], strict=True)), name


def test_flush_denormal_does_not_reach_the_interpreter():
    def make():
        subnormals = torch.arange(1, 65, dtype=torch.int32).view(F32)
        return {"w": (torch.zeros(64), None)}, {"w": (subnormals, None)}, None

    expected = raw(both(make, SEEDS[:1], [2e-38]).tensors[0])
    assert torch.set_flush_denormal(True)
    try:
        assert torch.equal(raw(both(make, SEEDS[:1], [2e-38]).tensors[0]), expected)
    finally:
        torch.set_flush_denormal(False)


def test_says_why_it_is_unavailable():
    assert triton_backend.unavailable(torch.device(DEVICE)) is None
    assert "\n" not in triton_backend.unavailable(torch.device("xpu"))
    without = (
        "import sys; sys.modules['triton'] = None; import torch, es_kernels; "
        "print(es_kernels.backends.unavailable('triton', torch.device('cuda')))"
    )
    assert "pip install triton" in run_python(without)
    compiled = "import torch, es_kernels; print(es_kernels.backends.unavailable('triton', torch.device('cpu')))"
    assert "TRITON_INTERPRET=1" in run_python(compiled)


# ---- compiled, for machines that are not here ----

COMPILE = """
import json, sys
from es_kernels.backends import triton
for target, name, options in json.loads(sys.argv[1]):
    for kind, code in triton.compile_for(target, **options).asm.items():
        if kind in ("ptx", "cubin", "amdgcn"):
            open(f"{sys.argv[2]}/{target} {name}.{kind}", "w" if isinstance(code, str) else "wb").write(code)
"""


def run_python(source, *arguments):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path))
    }
    done = subprocess.run([sys.executable, "-c", source, *map(str, arguments)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


VARIANTS = {
    "one seed": {},
    "any number of seeds": {"n_seeds": None},
    "everything": {"n_seeds": None, "stochastic": True, "decay": True},
    "low rank, one seed": {"noise_rank": 1},
    "low rank": {"noise_rank": 1, "n_seeds": None},
    "factors": {"kernel": "factors"},
    "fingerprint": {"kernel": "fingerprint"},
}


TARGETS = {target: VARIANTS if target == 90 else ["everything"] for target in (80, 90, 100, 120, "gfx942")}


@pytest.fixture(scope="module")
def compiled(made_once):
    """A folder with each variant compiled for each target: by one process, which imports torch once."""
    asked = [(target, name, VARIANTS[name]) for target, names in TARGETS.items() for name in names]
    return made_once("triton", lambda folder: run_python(COMPILE, json.dumps(asked), folder))


@pytest.mark.parametrize("target", TARGETS)
def test_compiles(target, compiled):
    for name in TARGETS[target]:
        file = f"{target} {name}"
        if target == "gfx942":
            code = (compiled / f"{file}.amdgcn").read_text()
            assert re.search(r"\.private_segment_fixed_size:\s*0\b", code), f"{name}: spills"
            assert "global_load_dwordx4" in code and "global_store_dwordx4" in code
            assert re.search(r"\.amdhsa_float_denorm_mode_32 3", code), f"{name}: flushes subnormals"
            continue
        ptx = (compiled / f"{file}.ptx").read_text()
        assert ".ftz" not in ptx
        # .rn forbids ptxas to contract: the only fma's are those that the kernel asks for.
        assert not re.search(r"\b(add|sub|mul|fma)(?!\.rn)\.f32|\bmad\S*\.f32", ptx)
        if name != "factors":
            assert "ld.global.v4" in ptx and ("st.global.v4" in ptx or name == "fingerprint")
        usage = subprocess.run(
            [cuobjdump(), "-res-usage", compiled / f"{file}.cubin"], capture_output=True, text=True, check=True
        ).stdout
        assert re.search(r"STACK:0 .*LOCAL:0 ", usage), f"{name}: spills: {usage}"
        if "noise_rank" not in VARIANTS[name] and name not in ("factors", "fingerprint"):
            assert re.search(r"SHARED:0 ", usage), f"{name}: threads exchange values: {usage}"


def cuobjdump():
    return pathlib.Path(triton_backend.triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
