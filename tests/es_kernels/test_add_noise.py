"""Contract under test: add_noise_ gives the same bits on every backend and instruction set, whatever surrounds the
call.

- cpu == reference, and csrc/cuda.cu run on the CPU == reference: dtypes and their mixtures, sizes, storage offsets,
  strides, shards, seeds, both roundings, decay and anchor, indices up to 2^64; NaN, inf, -0, subnormals; under
  torch.set_flush_denormal(True). Memory around the tensor is not touched.
- The reference is the order of operations of NOISE.md (golden vectors, and a plain NumPy text of it here).
- Thread count, chunking, order of the tensors and sharding change nothing. The caller's floating-point state comes
  back.
- Stochastic rounding is unbiased.

(Triton has its own file; CUDA on a GPU is in tests/gpu.)
"""

import ctypes
import itertools
import json
import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import es_kernels
from es_kernels import ParamTable, Segment, add_noise_, noise
from es_kernels.__main__ import GOLDEN, self_check

from .conftest import ISAS

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16)
ROUNDINGS = ({}, {"rounding": "stochastic", "rounding_seed": 0x9876543210FEDCBA})
SEEDS = [noise.member_seed(1, 0, k) for k in range(30)]
COEFS = np.random.default_rng(0).normal(0, 0.05, 30).tolist()
FIRSTS = (0, 5, (1 << 32) - 20, (1 << 35) - 20, (1 << 35) + 3, (1 << 63) - 1, (1 << 64) - 80)

both_roundings = pytest.mark.parametrize("rounding", ROUNDINGS, ids=("nearest", "stochastic"))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("f32", "bf16", "f16"))


def at(tensor, first, name="w"):
    """The contiguous tensor as the elements from `first` on of the stream `name`."""
    return ParamTable([(name, tensor, [Segment(name, 1, tensor.numel(), first=first)])])


# ---- cpu == reference ----


def test_golden_vectors_on_every_instruction_set(isa):
    with es_kernels.backend("cpu"):
        self_check(json.loads(GOLDEN.read_text()), "cpu")


def test_golden_vectors_on_the_reference():
    with es_kernels.backend("reference"):
        self_check(json.loads(GOLDEN.read_text()), "cpu")


@both_roundings
@pytest.mark.parametrize("out, base", list(itertools.product(DTYPES, (None, *DTYPES))))
def test_dtypes_and_their_mixtures(isa, twin, weights, out, base, rounding):
    live, master = weights(333, out), None if base is None else weights(333, base, 1)
    twin(lambda t, m: add_noise_(t, SEEDS[0], 0.01, m, name="w", **rounding), live, master)


@both_roundings
@every_dtype
def test_sizes_and_storage_offsets(isa, twin, weights, dtype, rounding):
    """Sizes 0..33 at every offset modulo 16 bytes, base at another one: heads, tails, and addresses that no vector
    instruction likes."""
    names = [f"w{size}" for size in range(34)]

    def call(*t):
        live, master = (dict(zip(names, part, strict=True)) for part in (t[:34], t[34:]))
        add_noise_(live, SEEDS[:2], COEFS[:2], master, **rounding)

    for offset in range(9):
        live = [weights(size + offset + 5, dtype, size)[offset : offset + size] for size in range(34)]
        master = [weights(size + 12, F32, offset)[(7 * offset) % 11 :][:size] for size in range(34)]
        twin(call, *live, *master)


@both_roundings
@pytest.mark.parametrize("n_seeds", (0, 1, 2, 3, 30))
def test_number_of_seeds(isa, twin, weights, n_seeds, rounding):
    for dtype in DTYPES:
        twin(lambda t: add_noise_(t, SEEDS[:n_seeds], COEFS[:n_seeds], name="w", **rounding), weights(201, dtype))


@pytest.mark.parametrize("noise_rank", (0, 1))
def test_signs_of_zeros(isa, twin, noise_rank):
    """0 and -0 as coefficients of weights that are 0 and -0: a product that is no zero of its own sign would show."""
    zeros = torch.tensor([0.0, -0.0]).repeat(4, 20)
    for coefs in ([0.0], [-0.0], [-0.0, 0.0], [0.0, -0.0]):
        twin(lambda t, coefs=coefs: add_noise_(t, SEEDS[: len(coefs)], coefs, name="w", noise_rank=noise_rank), zeros)


@both_roundings
@pytest.mark.parametrize("anchor", (None, *DTYPES))
def test_decay_and_anchor(isa, twin, weights, anchor, rounding):
    for dtype, base, n in itertools.product(DTYPES, (None, F32, BF16), (0, 1, 2)):
        tensors = (
            weights(97, dtype),
            None if base is None else weights(97, base, 1),
            None if anchor is None else weights(97, anchor, 2),
        )
        twin(
            lambda t, m, a: add_noise_(t, SEEDS[:n], COEFS[:n], m, name="w", decay=0.01, anchor=a, **rounding), *tensors
        )


@both_roundings
@pytest.mark.parametrize("first", FIRSTS, ids=hex)
def test_first_index(isa, twin, weights, first, rounding):
    for dtype in DTYPES:
        twin(lambda t: add_noise_(at(t, first), SEEDS[:2], COEFS[:2], **rounding), weights(80, dtype))


@both_roundings
@pytest.mark.parametrize("first", [*FIRSTS[:-1], (1 << 35) - 1200], ids=hex)
def test_first_index_of_strided_rows(isa, twin, weights, first, rounding):
    """Rows with gaps in memory and index; with (1 << 35) - 20 a row, and a vector of blocks in it, crosses the end of
    32-bit block numbers."""
    for dtype in DTYPES:
        twin(
            lambda t: add_noise_(
                ParamTable([("w", t, [Segment("w", 4, 300, row_stride=301, first=first, index_stride=1003)])]),
                SEEDS[:2],
                COEFS[:2],
                **rounding,
            ),
            weights(4 * 301, dtype),
        )


@every_dtype
def test_large(isa, twin, weights, dtype):
    twin(lambda t: add_noise_(t, SEEDS[0], 0.01, name="w", **ROUNDINGS[1]), weights(100_003, dtype))


@both_roundings
def test_flush_denormal(isa, twin, weights, rounding):
    """torch.set_flush_denormal(True) sets FTZ and DAZ in this thread; weights, coefs and results that are subnormal
    survive it."""
    coefs = [-1e-40, 2e-38]
    tensors = [weights(257, dtype) for dtype in DTYPES]
    tensors.append(torch.arange(-128, 129, dtype=torch.int32).abs().view(F32).clone())  # subnormals only

    def call(*tensors):
        for i, t in enumerate(tensors):
            add_noise_(t, SEEDS[:2], coefs, name=f"w{i}", decay=1e-20, **rounding)

    plain = [t.clone() for t in tensors]
    with es_kernels.backend("reference"):
        call(*plain)
    assert torch.set_flush_denormal(True)
    try:
        flushed = twin(call, *tensors)
    finally:
        torch.set_flush_denormal(False)
    for a, b in zip(plain, flushed, strict=True):
        assert torch.equal(a.view(torch.int16), b.view(torch.int16))
    assert ((flushed[3] != 0) & (flushed[3].abs() < 2.0**-126)).sum() > 100


@both_roundings
@pytest.mark.parametrize(
    "view",
    (
        lambda t: t[:, :13],  # rows with gaps
        lambda t: t[3:9, 5:21],
        lambda t: t[::3],
        lambda t: t[::2, 8:16],  # whole blocks
        lambda t: t.reshape(4, 5, 2, 20)[:, 1:4, 1],  # 3-D with two strides
        lambda t: t.reshape(8, 5, 20).transpose(0, 1),  # rows in another order than memory
        lambda t: t.reshape(4, 10, 20)[:, ::3, :7].transpose(0, 1),
        lambda t: t[:, 4:5],
        lambda t: t[5],
        lambda t: t[2, 3],
    ),
    ids=(
        "columns",
        "window",
        "every_third_row",
        "blocks",
        "3d",
        "transposed_rows",
        "3d_transposed",
        "one_column",
        "row",
        "scalar",
    ),
)
def test_strided(isa, twin, weights, bits, view, rounding):
    for dtype in DTYPES:
        before = weights(800, dtype).reshape(40, 20)
        after = twin(lambda t: add_noise_(t, SEEDS[:2], COEFS[:2], name="w", **rounding), view(before))[0]
        # As the contiguous tensor of the same values would.
        contiguous = view(before).clone(memory_format=torch.contiguous_format)
        add_noise_(contiguous, SEEDS[:2], COEFS[:2], name="w", **rounding)
        assert torch.equal(bits(after), bits(contiguous))


@both_roundings
def test_strided_base_and_anchor_differ_from_out(isa, twin, weights, rounding):
    live, master, anchor = (
        weights(800, BF16).reshape(40, 20),
        weights(900, F32, 1).reshape(30, 30),
        weights(480, F16, 2).reshape(30, 16),
    )
    twin(
        lambda t, m, a: add_noise_(t, SEEDS[:2], COEFS[:2], m, name="w", decay=0.1, anchor=a, **rounding),
        live[:30, 2:18], master[:, 7:23], anchor,
    )  # fmt: skip


def test_expanded_base_is_read_many_times(isa, twin, weights):
    twin(
        lambda t, m: add_noise_(t, SEEDS[0], 0.1, m.expand(9, 20), name="w"),
        weights(180, BF16).reshape(9, 20),
        weights(20, F32),
    )


# ---- what the numbers mean ----


def test_order_of_operations(weights):
    """The page's order on ordinary float32 weights, by torch's own operations and noise.fma."""
    b, anchor = (
        weights(500, F32).nan_to_num(0, 0, 0).clamp(-1, 1),
        weights(500, BF16, 1).nan_to_num(0, 0, 0).clamp(-1, 1),
    )
    index = np.arange(500, dtype=np.uint64)
    drawn = [noise.normal(s, noise.stream_id("w"), index) for s in SEEDS[:3]]
    coefs, decay = np.array(COEFS[:3], np.float32), np.float32(0.01)
    expected = noise.fma(-decay, b.numpy() - anchor.float().numpy(), b.numpy())
    acc = noise.fma(coefs[1], drawn[1], noise.fma(coefs[0], drawn[0], np.float32(0)))
    expected = noise.fma(coefs[2], drawn[2], expected + acc)
    out = torch.full((500,), float("nan"))
    add_noise_(out, SEEDS[:3], COEFS[:3], b, name="w", decay=0.01, anchor=anchor)
    assert (out.numpy().view(np.uint32) == expected.view(np.uint32)).all()


def near_ties():
    """(index, coef, base) whose exact coef * noise + base lies within 2^-53 of a tie between two float32, off it:
    rounding to float64 first lands on the tie. One value in 32 has a coefficient that does this; random ones never
    do."""
    index = np.arange(4096, dtype=np.uint64)
    drawn = noise.normal(SEEDS[0], noise.stream_id("w"), index)
    scale = np.frexp(drawn)[1]
    mantissa = np.abs(np.ldexp(drawn, 24 - scale)).astype(np.int64)  # 2^23 .. 2^24
    other = np.rint(2.0**47 / mantissa).astype(np.int64)
    off = mantissa * other - 2**47  # the product is 2^47 (1 + off / 2^47)
    hits = np.flatnonzero((np.abs(off) < 2**17) & (off != 0) & (other < 2**24))
    for k, i in enumerate(hits):
        base = 1.0 if off[i] > 0 else 1 + 2.0**-23  # where the tie goes to even, the other way
        # Coef * noise = 2^-24 (1 + off / 2^47)
        coef = np.copysign(np.ldexp(float(other[i]), -47 - int(scale[i])), drawn[i])
        sign = -1 if k % 2 else 1
        yield int(i), float(sign * coef), sign * base


def test_fma_rounds_once_on_constructed_ties(isa):
    double_rounding = 0
    for index, coef, base in near_ties():
        x = noise.normal(SEEDS[0], noise.stream_id("w"), np.uint64(index))
        expected = noise.fma(np.float32(coef), x, np.float32(base))
        double_rounding += np.float32(np.float64(np.float32(coef)) * np.float64(x) + base) != expected
        out = torch.tensor([base])
        with es_kernels.backend("cpu"):
            add_noise_(at(out, index), SEEDS[0], coef)
        assert out.item() == expected
    assert double_rounding > 20, "the cases do not tell one rounding from two"


def test_perturb_then_restore_from_base(weights, bits):
    """Restore is nearest(base), bit for bit, but that NaNs become the one NaN."""
    for live, base in itertools.product(DTYPES, DTYPES):
        master = weights(1000, base)
        out = torch.empty(1000, dtype=live)
        for k in range(30):
            add_noise_(out, SEEDS[k], 0.1, master, name="w")
        add_noise_(out, [], [], master, name="w")
        expected = torch.where(master.isnan(), torch.tensor(float("nan"), dtype=live), master.to(live))
        assert torch.equal(bits(out), bits(expected))


def test_ten_thousand_members_leave_no_trace(weights, bits):
    """With a base nothing accumulates: after 10,000 perturbations a restore gives nearest(base), bit for bit."""
    master = {"a": weights(201, F32), "b": weights(64, BF16).reshape(8, 8), "c": weights(33, F16)}
    live = {"a": torch.zeros(201, dtype=BF16), "b": torch.zeros(8, 8, dtype=BF16), "c": torch.zeros(33, dtype=F16)}
    table, base = ParamTable(live), ParamTable(master)
    add_noise_(table, [], [], base)
    before, prints = [bits(t) for t in live.values()], es_kernels.fingerprint(table)
    for member in range(10_000):
        add_noise_(table, noise.member_seed(1, 0, 0) + member, 1e-3, base)
    assert es_kernels.fingerprint(table) != prints
    add_noise_(table, [], [], base)
    assert all(map(torch.equal, before, [bits(t) for t in live.values()])) and es_kernels.fingerprint(table) == prints


def test_swap_in_float32_gives_nearly_the_other_member():
    live = torch.zeros(4096)
    add_noise_(live, SEEDS[0], 0.5, name="w")
    add_noise_(live, SEEDS[:2], [-0.5, 0.5], name="w")
    other = torch.zeros(4096)
    add_noise_(other, SEEDS[1], 0.5, name="w")
    assert (live - other).abs().max() < 1e-6


@every_dtype
def test_nan_is_canonical_and_infinity_stays(isa, dtype):
    nan = {F32: 0x7FC00000, BF16: 0x7FC0, F16: 0x7E00}[dtype]
    integers = torch.int32 if dtype == F32 else torch.int16
    t = torch.tensor([float("nan"), -float("nan"), float("inf"), -float("inf")] * 8).to(dtype)
    if dtype != F32:
        t.view(torch.int16)[0] = {BF16: 0x7F81, F16: 0x7C01}[dtype]  # signalling
    for rounding in ROUNDINGS:
        for seeds, coefs in (([], []), (SEEDS[:1], [1.0])):
            out = t.clone()
            add_noise_(out, seeds, coefs, name="w", **rounding)
            assert (out.view(integers).reshape(8, 4)[:, :2] == nan).all()
            assert torch.equal(out.reshape(8, 4)[:, 2:], t.reshape(8, 4)[:, 2:])


@every_dtype
def test_overflow_gives_infinity(isa, dtype):
    largest = torch.full((64,), torch.finfo(dtype).max, dtype=dtype)
    for rounding in ROUNDINGS:
        out = largest.clone()
        add_noise_(out, SEEDS[0], torch.finfo(dtype).max, name="w", **rounding)
        assert out.isinf().any() and not out.isnan().any()


def test_one_seed_as_number_list_tensor_signed_or_unsigned(weights, bits):
    t = weights(100, F32)
    forms = [
        (1 << 63) + 5,
        (1 << 63) + 5 - (1 << 64),
        [(1 << 63) + 5],
        np.uint64((1 << 63) + 5),
        torch.tensor([(1 << 63) + 5 - (1 << 64)]),
        torch.tensor((1 << 63) + 5 - (1 << 64)),
    ]
    results = []
    for seed in forms:
        for coef in (0.1, [0.1], np.float64(0.1), torch.tensor([0.1]), torch.tensor(0.1)):
            results.append(bits(add_noise_(t.clone(), seed, coef, name="w")))
    assert all(torch.equal(results[0], r) for r in results)
    seeds = torch.arange(8)[::2]  # not contiguous
    assert torch.equal(
        bits(add_noise_(t.clone(), seeds, [0.1] * 4, name="w")),
        bits(add_noise_(t.clone(), [0, 2, 4, 6], [0.1] * 4, name="w")),
    )


def test_coefs_and_decay_are_cast_to_float32_first(weights, bits):
    t = weights(100, F32)
    c = float(np.float32(0.1))
    assert torch.equal(
        bits(add_noise_(t.clone(), 1, 0.1, name="w", decay=0.1)), bits(add_noise_(t.clone(), 1, c, name="w", decay=c))
    )
    # A decay that float32 makes 0 is no decay: -0 - (+0) would have become visible.
    zeros = torch.full((16,), -0.0)
    assert torch.equal(bits(add_noise_(zeros.clone(), [], [], name="w", decay=1e-60)), bits(zeros))


@pytest.mark.parametrize(
    "coef",
    (
        1e-40,
        -1e-40,
        1.4e-45,
        7.1e-46,
        -7e-46,
        2.0**-150,
        1.5 * 2.0**-149,
        2.5 * 2.0**-149,
        1.1754943e-38,
        1.17549429e-38,
        2.0**-126 - 2.0**-151,
    ),
)
def test_subnormal_coefs_are_rounded_like_others(coef, bits):
    expected = (
        add_noise_(torch.zeros(64), [1, 2], torch.tensor([coef, 0.5]), name="w"),
        add_noise_(torch.zeros(64), 1, torch.tensor(coef), name="w"),
    )
    got = add_noise_(torch.zeros(64), [1, 2], [coef, 0.5], name="w"), add_noise_(torch.zeros(64), 1, coef, name="w")
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(got, expected, strict=True))


def test_name_gives_the_stream(weights, bits):
    t = weights(100, F32)
    by_name = add_noise_(t.clone(), 1, 0.1, name="a.b")
    for other in (
        add_noise_(t.clone(), 1, 0.1, stream=noise.stream_id("a.b")),
        add_noise_({"a.b": t.clone()}, 1, 0.1)["a.b"],
        add_noise_([("a.b", t.clone())], 1, 0.1)[0][1],
    ):
        assert torch.equal(bits(by_name), bits(other))
    assert not torch.equal(bits(by_name), bits(add_noise_(t.clone(), 1, 0.1, name="a.c")))


# ---- independence ----


@both_roundings
@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("n_threads", (1, 2, 3, 7, 64))
def test_threads(isa, weights, bits, threads, n_threads, rounding):
    """300,000 values are nine threads' worth of work; tensors and cuts do not align."""
    tensors = {f"w{i}": weights(n, DTYPES[i % 3], i) for i, n in enumerate((100_003, 1, 70_001, 40_000, 90_005))}

    def call(n):
        copies = {k: t.clone() for k, t in tensors.items()}
        with threads(n):
            add_noise_(copies, SEEDS[:2], COEFS[:2], **rounding)
            return [bits(t) for t in copies.values()], es_kernels.fingerprint(copies)

    (one, one_print), (many, many_print) = call(1), call(n_threads)
    assert all(map(torch.equal, one, many)) and one_print == many_print


@both_roundings
def test_order_of_tensors(weights, bits, rounding):
    tensors = {f"w{i}": weights(50 + i, DTYPES[i % 3], i) for i in range(9)}
    results = []
    for order in (list(tensors), list(reversed(tensors)), sorted(tensors, key=lambda n: hash(n) % 7)):
        copies = {k: tensors[k].clone() for k in order}
        add_noise_(copies, SEEDS[:3], COEFS[:3], **rounding)
        results.append(copies)
    one_by_one = {k: add_noise_(t.clone(), SEEDS[:3], COEFS[:3], name=k, **rounding) for k, t in tensors.items()}
    for k in tensors:
        for other in (*results[1:], one_by_one):
            assert torch.equal(bits(results[0][k]), bits(other[k]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_shards_equal_the_whole(weights, bits, data):
    """A 2-D tensor cut into rectangles, each a tensor of its own memory (or a view of a larger one) with its
    Segment."""
    dtype, rounding = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(ROUNDINGS))
    rows, cols = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 40))
    cuts = [sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=3))}) for n in (rows, cols)]
    first = data.draw(st.sampled_from((0, 3, (1 << 35) - 100)))
    whole = weights(rows * cols, dtype).reshape(rows, cols)
    shards = []
    for (top, bottom), (left, right) in itertools.product(*(list(itertools.pairwise(c)) for c in cuts)):
        shape = bottom - top, right - left
        padded = torch.full((shape[0], shape[1] + data.draw(st.integers(0, 3))), 7, dtype=dtype)
        padded[:, : shape[1]] = whole[top:bottom, left:right]
        segment = Segment("w", *shape, row_stride=padded.stride(0), first=first + top * cols + left, index_stride=cols)
        shards.append((f"shard{len(shards)}", padded, [segment], (slice(top, bottom), slice(left, right))))
    shards = data.draw(st.permutations(shards))
    before = [s[1].clone() for s in shards]
    expected = whole.clone()
    call = lambda t: add_noise_(t, SEEDS[:2], COEFS[:2], **rounding)  # noqa: E731
    call(ParamTable([("w", expected, [Segment("w", 1, rows * cols, first=first)])]))
    with es_kernels.backend(data.draw(st.sampled_from(("cpu", "reference")))):
        table = ParamTable([s[:3] for s in shards])
        call(table)
    for (_, got, _, where), old in zip(shards, before, strict=True):
        n = where[1].stop - where[1].start
        assert torch.equal(bits(got[:, :n]), bits(expected[where])) and torch.equal(bits(got[:, n:]), bits(old[:, n:]))


def test_fused_tensor_is_one_segment_per_part(weights, bits):
    """The rows of q, k and v inside qkv draw the noise of the three tensors of the checkpoint."""
    parts = {
        n: weights(rows * 24, BF16, i).reshape(rows, 24) for i, (n, rows) in enumerate((("q", 8), ("k", 4), ("v", 4)))
    }
    qkv = torch.cat(list(parts.values()))
    segments = [Segment("q", 8, 24), Segment("k", 4, 24, offset=8 * 24), Segment("v", 4, 24, offset=12 * 24)]
    add_noise_(ParamTable([("qkv", qkv, segments)]), SEEDS[:2], COEFS[:2], **ROUNDINGS[1])
    add_noise_(parts, SEEDS[:2], COEFS[:2], **ROUNDINGS[1])
    assert torch.equal(bits(qkv), bits(torch.cat(list(parts.values()))))


# ---- floating-point state ----


def mxcsr():
    """The SSE control word of this thread, through fegetenv (glibc x86-64: the last word of fenv_t)."""
    environment = (ctypes.c_uint32 * 8)()
    ctypes.CDLL("libm.so.6").fegetenv(environment)
    return environment[7]


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="MXCSR is x86")
def test_floating_point_state_comes_back(isa, weights):
    """Rounding mode and FTZ / DAZ of the caller neither reach the result nor get lost."""
    libm = ctypes.CDLL("libm.so.6")
    t = weights(1000, F32)
    tiny = torch.full((1000,), 3, dtype=torch.int32).view(F32)
    expected = [add_noise_(x.clone(), SEEDS[:2], [0.1, 1e-41], name="w").view(torch.int32) for x in (t, tiny)]
    x, y = t.clone(), tiny.clone()
    FE_UPWARD = 0x800
    assert torch.set_flush_denormal(True) and libm.fesetround(FE_UPWARD) == 0
    try:
        before = mxcsr()
        add_noise_(x, SEEDS[:2], [0.1, 1e-41], name="w")
        add_noise_(y, SEEDS[:2], [0.1, 1e-41], name="w")
        after = mxcsr()
    finally:
        libm.fesetround(0)
        torch.set_flush_denormal(False)
    # Status flags (bits 0..5) may be anything; FTZ, rounding mode, masks and DAZ may not.
    assert before & ~0x3F == after & ~0x3F and before & 0x8000 and before & 0x40 and before >> 13 & 3 == 2
    assert torch.equal(x.view(torch.int32), expected[0]) and torch.equal(y.view(torch.int32), expected[1])


# ---- stochastic rounding ----


@pytest.mark.parametrize(
    "dtype, value",
    (
        (BF16, 1.0 + 2**-9),
        (BF16, -0.1),
        (BF16, 1e-39),
        (BF16, 3.3e-41),
        (F16, 0.1),
        (F16, -1000.3),
        (F16, 3e-5),
        (F16, 1e-7),
        (F16, -2.5e-8),
        (F16, 6.1e-5),
        (F16, 6.097e-5),
    ),
)
def test_stochastic_rounding_is_unbiased(dtype, value):
    """Over 2^18 fresh thresholds the mean is the value, within 5 standard errors, and only the two neighbours occur."""
    n = 1 << 18
    x = float(np.float32(value))
    out = torch.empty(n, dtype=dtype)
    add_noise_(out, [], [], torch.full((n,), x), name="w", rounding="stochastic", rounding_seed=5)
    found = out.unique().double()
    nearest = torch.tensor(x).to(dtype).double()
    assert len(found) == 2 and found[0] < x < found[1] and nearest in found
    ulp = found[1] - found[0]
    p = (x - found[0]) / ulp
    bound = 5 * ulp * (p * (1 - p) / n) ** 0.5 + ulp / 65536
    assert (out.double().mean() - x).abs() < bound


@pytest.mark.parametrize("dtype", (BF16, F16), ids=("bf16", "f16"))
def test_what_the_dtype_can_hold_is_not_rounded(isa, dtype, weights, bits):
    t = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)  # every value that there is
    t = t[~t.isnan()]
    out = torch.empty_like(t)
    add_noise_(out, [], [], t.float(), name="w", rounding="stochastic", rounding_seed=6)
    assert torch.equal(bits(out), bits(t))


@pytest.mark.parametrize("dtype", (BF16, F16), ids=("bf16", "f16"))
def test_roundings_in_every_binade(isa, twin, dtype):
    """float32 of every exponent, with fractions at, next to and between ties."""
    rng = np.random.default_rng(0)
    fractions = np.array(
        [
            0,
            1,
            0xFFF,
            0x1000,
            0x1001,
            0x1FFF,
            0x2000,
            0x3000,
            0x7FFF,
            0x8000,
            0x8001,
            0xFFFF,
            0x18000,
            0x7FFFFF,
            *rng.integers(0, 1 << 23, 18),
        ],
        np.uint32,
    )
    values = (np.arange(256, dtype=np.uint32)[:, None] << np.uint32(23) | fractions).reshape(-1)
    t = torch.from_numpy(np.concatenate([values, values | np.uint32(1 << 31)]).view(np.float32))
    for rounding in ROUNDINGS:
        out = twin(lambda o, b: add_noise_(o, [], [], b, name="w", **rounding), torch.empty(len(t), dtype=dtype), t)[0]
        if not rounding:
            assert torch.equal(out.nan_to_num(7), t.to(dtype).nan_to_num(7))


def test_fresh_rounding_seeds_give_fresh_thresholds():
    x = torch.full((4096,), 1.0 + 2**-9)
    outs = []
    for rounding_seed in (1, 2, 1):
        outs.append(torch.empty(4096, dtype=BF16))
        add_noise_(outs[-1], [], [], x, name="w", rounding="stochastic", rounding_seed=rounding_seed)
    assert torch.equal(outs[0], outs[2])
    agreement = (outs[0] == outs[1]).float().mean()
    assert 0.57 < agreement < 0.68  # p = 1/4: (1/4)^2 + (3/4)^2 = 0.625
    drawn, other = torch.empty(4096, dtype=BF16), torch.empty(4096, dtype=BF16)
    add_noise_(drawn, [1], [0.0], x, name="w", rounding="stochastic", rounding_seed=1)
    add_noise_(other, [], [], x, name="v", rounding="stochastic", rounding_seed=1)
    assert torch.equal(drawn, outs[0]), "noise and rounding draw from domains of their own"
    assert not torch.equal(other, outs[0])


def test_rounding_seed_forms(weights, bits):
    t = weights(100, BF16)
    seeds = ((1 << 64) - 3, -3, torch.tensor(-3), torch.tensor([-3]))
    results = [bits(add_noise_(t.clone(), 1, 0.01, name="w", rounding="stochastic", rounding_seed=s)) for s in seeds]
    assert all(torch.equal(results[0], r) for r in results)


@pytest.mark.parametrize("decay", (0.0, 0, 1e-60))  # as float32 the last is 0 too
def test_without_decay_an_anchor_changes_nothing(twin, bits, weights, decay):
    """A learning-rate schedule that ends at 0 takes the decay there, with the anchor still passed."""
    t, anchor = weights(100, torch.bfloat16), weights(100, torch.float32, seed=1)
    (pulled, _) = twin(lambda t, a: add_noise_(t, [1, 2], [0.1, 0.2], name="w", decay=decay, anchor=a), t, anchor)
    (plain,) = twin(lambda t: add_noise_(t, [1, 2], [0.1, 0.2], name="w"), t)
    assert torch.equal(bits(pulled), bits(plain))
