"""Contract under test: the PTX that nvcc makes of csrc/cuda.cu and Triton of its kernels gives the reference's bits,
touches only the memory that a call names, and no thread depends on when another one runs. It runs in
ptx/interpreter.py, behind the backends' own host code; only ptxas and the hardware are left out.

Here: the interpreter itself; calls on a table that holds a bit of everything; sizes and numbers of seeds; and faults
planted in nvcc's PTX, which those calls must find. Marked slow, test_add_noise.py, test_fingerprint.py and
test_cuda_on_cpu.py run on PTX too.
"""

import contextlib
import itertools

import numpy as np
import pytest
import torch

import es_kernels
from es_kernels import ParamTable, Segment, add_noise_, native, noise

from .ptx import interpreter, mutants

F32, BF16, F16 = DTYPES = torch.float32, torch.bfloat16, torch.float16
SEEDS = [noise.member_seed(1, 0, k) for k in range(300)]
COEFS = np.random.default_rng(0).normal(0, 0.05, 300).tolist()
STOCHASTIC = {"rounding": "stochastic", "rounding_seed": 0x9876543210FEDCBA}


# ---- the interpreter ----

MODULE = """
.version 9.0
.target sm_90
.address_size 64
.visible .entry kernel(.param .u64 kernel_param_0, .param .u64 kernel_param_1, .param .f32 kernel_param_2)
{{
  .reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<16>; .reg .f32 %f<8>; .reg .b64 %d<16>;
  .shared .align 16 .b8 buffer[256];
  ld.param.u64 %d0, [kernel_param_0];
  ld.param.u64 %d1, [kernel_param_1];
  ld.param.f32 %f0, [kernel_param_2];
  mov.u32 %r0, %tid.x;
  mul.wide.u32 %d2, %r0, 4;
  add.s64 %d3, %d0, %d2;  // where this thread writes 32 bits
  add.s64 %d4, %d1, %d2;  // and reads
  ld.global.u32 %r1, [%d4];
  {}
  ret;
}}
"""


def run(body, values=None, blocks=1, threads=64):
    """What each thread of each block writes of 32 bits where %d3 points. %r1: its value."""
    (kernel,) = interpreter.parse(MODULE.format(body)).values()
    kernel.budget = 10_000
    read = np.resize(np.asarray(np.arange(threads) if values is None else values, np.uint32), threads)
    out = np.full(threads, 0xDEADBEEF, np.uint32)
    memory = interpreter.process_memory([(out.ctypes.data, out.nbytes, True), (read.ctypes.data, read.nbytes, False)])
    parameters = np.array([out.ctypes.data, read.ctypes.data, 0x40490FDB], np.uint64).view(np.uint8)[:20]
    interpreter.launch(kernel, blocks, threads, parameters, 0, memory)
    return out


HARD = [
    0,
    1,
    0x7FFFFF,
    0x800000,
    0x3F800000,
    0x3F800001,
    0x33800000,
    0x477FEFFF,
    0x477FF000,
    0x38800001,
    0x7F7FFFFF,
    0x7F800000,
]
HARD += [0x7F800001, 0x7FC12345]
HARD = np.array(HARD, np.uint32)
HARD = np.concatenate([HARD, HARD | np.uint32(1 << 31), np.random.default_rng(0).integers(0, 1 << 32, 36, np.uint32)])


@pytest.mark.parametrize(
    "instructions, expected",
    [
        ("sub.s32 %r2, %r1, 7", lambda u: u - np.uint32(7)),
        ("mul.hi.u32 %r2, %r1, -845247145", lambda u: u.astype(np.uint64) * np.uint64(0xCD9E8D57) >> np.uint64(32)),
        (
            "mul.wide.s32 %d5, %r1, -3; shr.s64 %d5, %d5, 20; cvt.u32.u64 %r2, %d5",
            lambda u: u.view(np.int32).astype(np.int64) * -3 >> 20,
        ),
        ("mad.lo.s32 %r2, %r1, %r1, 5", lambda u: u * u + np.uint32(5)),
        ("shr.s32 %r2, %r1, 31", lambda u: u.view(np.int32) >> 31),
        ("shl.b32 %r2, %r1, 32", lambda u: u * 0),
        ("shf.l.wrap.b32 %r2, %r1, %r1, 37", lambda u: u << np.uint32(5) | u >> np.uint32(27)),
        ("shf.r.wrap.b32 %r2, %r1, 1, 1", lambda u: u >> np.uint32(1) | np.uint32(1 << 31)),
        ("bfe.u32 %r2, %r1, 3, 4", lambda u: u >> np.uint32(3) & np.uint32(15)),
        (
            "mul.wide.u32 %d5, %r1, %r1; bfe.u64 %d5, %d5, 20, 29; cvt.u32.u64 %r2, %d5",
            lambda u: u.astype(np.uint64) * u >> np.uint64(20) & np.uint64((1 << 29) - 1),
        ),
        (
            "bfi.b32 %r2, %r1, 0x55555555, 4, 12",
            lambda u: (u & np.uint32(0xFFF)) << np.uint32(4) | np.uint32(0x55550005),
        ),
        ("lop3.b32 %r2, %r1, 0xFF00, %r0, 0xEA", lambda u: u & np.uint32(0xFF00) | np.arange(64, dtype=np.uint32)),
        ("lop3.b32 %r2, %r1, 0xFF00, %r0, 0x96", lambda u: u ^ np.uint32(0xFF00) ^ np.arange(64, dtype=np.uint32)),
        ("prmt.b32 %r2, %r1, 0x11223344, 0x5410U", lambda u: u & np.uint32(0xFFFF) | np.uint32(0x33440000)),
        (
            "prmt.b32 %r2, %r1, 0, 0xB210",
            lambda u: (u & np.uint32(0xFFFFFF)) | np.where(u >> np.uint32(31), np.uint32(0xFF000000), np.uint32(0)),
        ),
        (
            "cvt.s64.s32 %d5, %r1; div.s64 %d5, %d5, 7; cvt.u32.u64 %r2, %d5",
            lambda u: np.trunc(u.view(np.int32) / 7.0).astype(np.int64),
        ),
        ("div.u32 %r2, %r1, 7", lambda u: u // np.uint32(7)),
        ("min.s32 %r2, %r1, 5", lambda u: np.minimum(u.view(np.int32), 5)),
        (
            "min.s16x2 %r2, %r1, 0x7FC07FC0",
            lambda u: np.minimum(u.view(np.int16), np.int16(0x7FC0)).view(np.uint32),
        ),
        ("setp.lt.s32 %p0, %r1, 0; selp.b32 %r2, 3, %r1, %p0", lambda u: np.where(u >> np.uint32(31), np.uint32(3), u)),
        ("mov.b32 {%h0, %h1}, %r1; mov.b32 %r2, {%h1, %h0}", lambda u: u << np.uint32(16) | u >> np.uint32(16)),
        ("mov.b32 %f1, %r1; neg.f32 %f2, %f1; abs.f32 %f3, %f2; mov.b32 %r2, %f3", lambda u: u & np.uint32(0x7FFFFFFF)),
        ("cvt.rn.f32.u32 %f1, %r1; mov.b32 %r2, %f1", lambda u: u.astype(np.float32).view(np.uint32)),
        ("cvt.rn.f32.s32 %f1, %r1; mov.b32 %r2, %f1", lambda u: u.view(np.int32).astype(np.float32).view(np.uint32)),
        (
            "mov.b32 %f1, %r1; setp.nan.f32 %p0, %f1, %f1; selp.b32 %r2, 1, 0, %p0",
            lambda u: np.isnan(u.view(np.float32)),
        ),
        (
            "mov.b32 %f1, %r1; setp.eq.f32 %p0, %f1, 0f00000000; selp.b32 %r2, 1, 0, %p0",
            lambda u: u << np.uint32(1) == 0,
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_integers_and_bits(instructions, expected):
    with np.errstate(all="ignore"):
        wanted = expected(np.resize(HARD, 64)).astype(np.int64).astype(np.uint32)
    assert (run(f"{instructions}; st.global.u32 [%d3], %r2;", HARD) == wanted).all()


@pytest.mark.parametrize("operation", ("add", "sub", "mul"))
def test_float32_arithmetic(operation):
    """Subnormals are kept; any NaN is 7FFFFFFF; one rounding."""
    x = np.resize(HARD, 64).view(np.float32)
    with np.errstate(all="ignore"):
        wanted = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation](x, x[::-1])
    wanted = np.where(np.isnan(wanted), np.uint32(0x7FFFFFFF), wanted.view(np.uint32))
    exchange = """shl.b32 %r3, %r0, 2; mov.u32 %r4, buffer; add.s32 %r5, %r4, %r3; st.shared.b32 [%r5], %r1; bar.sync 0;
    sub.s32 %r6, 252, %r3; add.s32 %r6, %r6, %r4; ld.shared.f32 %f2, [%r6];"""
    assert (
        run(f"mov.b32 %f1, %r1; {exchange} {operation}.rn.f32 %f3, %f1, %f2; st.global.f32 [%d3], %f3;", HARD) == wanted
    ).all()


def test_fma_rounds_once():
    """2^-12 * 2^-12 + x, and products just off a tie: what float64 would round twice."""
    a = np.array(
        [0x3F800001, 0x3F800001, 0x33800001, 0x00800001, 0x00000001, 0x7F7FFFFF, 0x7FC00001, 0x3F7FFFFF], np.uint32
    )
    c = [0x33800000, 0xB3800000, 0x3F800000, 0x80000001, 0x00000001, 0xFF7FFFFF, 0x3F800000, 0xBF7FFFFE]
    for bits in c:
        f, addend = np.resize(a, 64).view(np.float32), np.uint32(bits).view(np.float32)
        wanted = noise.fma(f, f, addend)
        wanted = np.where(np.isnan(wanted), np.uint32(0x7FFFFFFF), wanted.view(np.uint32))
        assert (
            run(f"mov.b32 %f1, %r1; fma.rn.f32 %f2, %f1, %f1, 0f{bits:08X}; st.global.f32 [%d3], %f2;", a) == wanted
        ).all()


@pytest.mark.parametrize("dtype, name", ((BF16, "bf16"), (F16, "f16")))
def test_16_bit_formats(dtype, name):
    """Conversions to nearest even, with 7FFF for a NaN; sums and comparisons of pairs."""
    x = torch.from_numpy(np.resize(HARD, 64).view(np.float32))
    half = (
        torch.where(x.isnan(), 0x7FFF, x.to(dtype).view(torch.int16).to(torch.int32) & 0xFFFF).numpy().astype(np.uint32)
    )
    assert (
        run(f"mov.b32 %f1, %r1; cvt.rn.{name}.f32 %h0, %f1; cvt.u32.u16 %r2, %h0; st.global.u32 [%d3], %r2;", HARD)
        == half
    ).all()
    pair = f"mov.b32 %f1, %r1; cvt.rn.{name}x2.f32 %r2, %f1, 0f3F800000;"  # the second is the low half
    one = {"bf16": 0x3F80, "f16": 0x3C00}[name]
    assert (run(f"{pair} st.global.u32 [%d3], %r2;", HARD) == (half << np.uint32(16) | np.uint32(one))).all()
    doubled = (
        (torch.from_numpy(half.astype(np.uint16).view(np.int16)).view(dtype) * 2)
        .view(torch.int16)
        .numpy()
        .view(np.uint16)
        .astype(np.uint32)
    )
    doubled = np.where(x.isnan().numpy(), np.uint32(0x7FFF), doubled)
    two = {"bf16": 0x4000, "f16": 0x4000}[name]
    assert (
        run(f"{pair} add.{name}x2 %r3, %r2, %r2; st.global.u32 [%d3], %r3;", HARD)
        == (doubled << np.uint32(16) | np.uint32(two))
    ).all()
    result, yes = ("bf16x2", one) if name == "bf16" else ("u32", 0xFFFF)
    equal = np.where(x.isnan().numpy(), 0, yes).astype(np.uint32)
    assert (
        run(f"{pair} set.eq.{result}.{name}x2 %r3, %r2, %r2; st.global.u32 [%d3], %r3;", HARD)
        == (equal << np.uint32(16) | np.uint32(yes))
    ).all()


def test_f16_to_f32():
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    for part in x.reshape(-1, 1024)[::7]:
        values = part.numpy().view(np.uint16).astype(np.uint32)
        wanted = part.view(F16).float()
        wanted = torch.where(wanted.isnan(), 0x7FFFFFFF, wanted.view(torch.int32)).numpy().view(np.uint32)
        assert (
            run("cvt.u16.u32 %h0, %r1; cvt.f32.f16 %f1, %h0; st.global.f32 [%d3], %f1;", values, threads=1024) == wanted
        ).all()


def test_conversions_to_integers_saturate():
    x = np.array([-1.5, -0.5, 0.5, 1.5, 3e9, 5e9, -3e9, np.nan, np.inf, -np.inf, 2147483520.0], np.float32)
    for type, low, high in (("u32", 0, 2**32 - 1), ("s32", -(2**31), 2**31 - 1)):
        wanted = [0 if np.isnan(v) else int(np.trunc(min(max(float(v), low), high))) & 0xFFFFFFFF for v in x]
        got = run(f"mov.b32 %f1, %r1; cvt.rzi.{type}.f32 %r2, %f1; st.global.u32 [%d3], %r2;", x.view(np.uint32))
        assert got[: len(x)].tolist() == wanted


def test_threads_part_and_meet():
    """Each goes through a loop as often as its number says; all are together again behind it."""
    body = """mov.u32 %r2, 0; mov.u32 %r3, 0;
    $loop: setp.ge.u32 %p0, %r3, %r0; @%p0 bra $done;
    add.s32 %r2, %r2, %r3; add.s32 %r3, %r3, 1; bra.uni $loop;
    $done: shfl.sync.bfly.b32 %r4|%p1, %r2, 1, 31, -1; add.s32 %r2, %r2, %r4; st.global.u32 [%d3], %r2;"""
    n = np.arange(64)
    assert (run(body) == n * (n - 1) // 2 + (n ^ 1) * ((n ^ 1) - 1) // 2).all()


def test_sum_over_a_warp_and_atomics():
    body = "redux.sync.add.s32 %r2, %r1, -1; st.global.u32 [%d3], %r2;"
    assert run(body).tolist() == [sum(range(32))] * 32 + [sum(range(32, 64))] * 32
    out = run(
        "setp.lt.u32 %p0, %r0, 60; @%p0 bra $end; cvt.u64.u32 %d5, %r1; atom.global.add.u64 %d6, [%d0], %d5; $end:"
    )
    assert out[:2].view(np.uint64)[0] == (0xDEADBEEFDEADBEEF + 60 + 61 + 62 + 63) % (1 << 64)


@pytest.mark.parametrize(
    "body, words",
    [
        ("st.global.u32 [%d3+256], %r1;", "out of bounds"),
        ("st.global.u32 [%d4], %r1;", "may not be written"),
        ("ld.global.u32 %r2, [%d4+-4];", "may not be read"),
        ("ld.global.v4.u32 {%r2, %r3, %r4, %r5}, [%d4];", "misaligned"),
        ("ld.param.u64 %d5, [kernel_param_2+4];", "out of bounds"),
        ("add.s32 %r3, %r2, 1;", "uninitialised: %r2"),
        (
            "setp.lt.u32 %p0, %r0, 9; @%p0 bra $skip; mov.u32 %r2, 1; $skip: st.global.u32 [%d3], %r2;",
            "uninitialised: %r2",
        ),
        ("setp.lt.u32 %p0, %r0, 9; @%p0 mov.u32 %r2, 1; st.global.u32 [%d3], %r2;", "uninitialised: %r2"),
        ("ld.shared.u32 %r4, [buffer]; st.global.u32 [%d3], %r4;", "uninitialised: %r4"),
        ("st.shared.u32 [buffer], %r0;", "race"),
        (
            "mov.u32 %r2, buffer; shl.b32 %r3, %r0, 2; add.s32 %r2, %r2, %r3; st.shared.u32 [%r2], %r1; ld.shared.u32 "
            "%r4, [buffer+4];",
            "race",
        ),
        ("st.shared.u32 [buffer+256], 1;", "out of bounds"),
        ("st.global.u32 [%d0], %r1;", "race: threads write to one global address at once"),
        ("st.global.u32 [%d3], %r1; ld.global.u32 %r2, [%d0];", "race: a thread reads"),
        ("ld.global.u32 %r2, [%d0]; st.global.u32 [%d3], %r1;", "race: a thread writes"),
        ("setp.lt.u32 %p0, %r0, 9; @%p0 bra $end; bar.sync 0; $end:", "a barrier is reached by some threads"),
        (
            "setp.lt.u32 %p0, %r0, 9; @%p0 bra $end; shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1; $end:",
            "not all of them are there",
        ),
        ("div.u32 %r2, 1, %r0;", "division by zero"),
        ("$again: bra.uni $again;", "does not end"),
    ],
)
def test_traps(body, words):
    with pytest.raises(interpreter.Trap, match=words):
        run(body)


def test_two_blocks_at_one_address_are_a_race():
    with pytest.raises(interpreter.Trap, match="race"):
        run("st.global.u32 [%d3], %r1;", blocks=2)
    with pytest.raises(interpreter.Trap, match="race"):
        run("st.global.u32 [%d3], %r1;", blocks=2, threads=1024)  # which are not run together


@pytest.mark.parametrize(
    "instruction",
    [
        "add.f32 %f1, %f0, %f0",
        "mul.f32 %f1, %f0, %f0",
        "sub.f32 %f1, %f0, %f0",
        "add.rn.ftz.f32 %f1, %f0, %f0",
        "add.ftz.f32 %f1, %f0, %f0",
        "fma.rn.ftz.f32 %f1, %f0, %f0, %f0",
        "fma.rz.f32 %f1, %f0, %f0, %f0",
        "mul.rn.sat.f32 %f1, %f0, %f0",
        "mad.rn.f32 %f1, %f0, %f0, %f0",
        "cvt.rz.f16.f32 %h0, %f0",
        "cvt.ftz.f32.f16 %f1, %h0",
        "setp.lt.ftz.f32 %p0, %f0, %f0",
        "abs.ftz.f32 %f1, %f0",
        "sin.approx.f32 %f1, %f0",
        "rsqrt.approx.f32 %f1, %f0",
        "ex2.approx.ftz.f32 %f1, %f0",
        "vote.sync.any.pred %p0, %p1, -1",
        "bar.sync 1",
        "ld.volatile.global.u32 %r2, [%d4]",
        "ld.local.u32 %r2, [%d4]",
        "add.s64 %r2, %r1, %r1",
        "add.s32 %d5, %d0, %d0",
        "call foo",
    ],
)
def test_what_is_not_known_or_leaves_the_rounding_open_is_refused(instruction):
    with pytest.raises(interpreter.Unknown):
        run(f"mov.u16 %h0, 0; setp.eq.u32 %p1, %r0, 0; {instruction};")


# ---- the kernels ----

if native.why_not("cpu"):
    # Its table of functions is what the others stand in for
    pytest.skip(native.why_not("cpu"), allow_module_level=True)


def mixture(weights, seed=0):
    """out, base and anchor of one table: each format and size, an odd offset, rows with gaps, a shard, indices around
    2^35; and enough weights, in one row and in many, for every thread to do all that it does at once, of every pair of
    formats: ordinary ones, ones half-way between two of 16 bits, subnormals of f16."""
    sizes = (1, 7, 8, 9, 33, 300)
    out = [(f"w{i}", weights(n, DTYPES[i % 3], seed + i), None) for i, n in enumerate(sizes)]
    out += [
        ("odd", weights(70, BF16, seed + 10)[3:], None),
        ("rows", weights(480, F16, seed + 11).reshape(12, 40)[:, 3:30], None),
    ]
    out += [("blocks", weights(480, F32, seed + 12).reshape(12, 40)[:, 8:32], None)]
    out += [
        ("shard", weights(64, BF16, seed + 13).reshape(4, 16), [Segment("whole", 4, 16, first=16, index_stride=48)])
    ]
    for i, first in enumerate(((1 << 35) - 20, (1 << 35) - 64)):
        out.append((f"far{i}", weights(160, DTYPES[i], seed + 14 + i), [Segment(f"far{i}", 1, 160, first=first)]))
        rows = weights(96, DTYPES[2 - i], seed + 16 + i).reshape(4, 24)
        out.append((f"far rows{i}", rows, [Segment(f"far rows{i}", 4, 24, first=first, index_stride=1 << 33)]))
    for i, dtype in enumerate(DTYPES):
        out.append((f"many rows{i}", weights(30 * 320, dtype, seed + 60 + i).reshape(30, 320)[:, :312], None))
        out.append((f"many odd rows{i}", weights(30 * 320, dtype, seed + 63 + i).reshape(30, 320)[:, 3:314], None))
    base = [
        (name, weights(t.numel(), (F32, BF16)[i % 2], seed + 20 + i).reshape(t.shape), s)
        for i, (name, t, s) in enumerate(out)
    ]
    anchor = [
        (name, weights(t.numel(), DTYPES[i % 3], seed + 40 + i).reshape(t.shape), s)
        for i, (name, t, s) in enumerate(out)
    ]
    rng = np.random.default_rng(seed)
    for i, (dtype, from_) in enumerate(itertools.product(DTYPES, DTYPES)):
        values = rng.normal(0, 0.1, (3, 9001)).astype(np.float32)
        halfway = values[:, 3000:6000].view(np.uint32)
        # Ties of bf16 and of f16
        low = rng.choice(np.array([0x8000, 0x1000, 0x3000, 0xFFFF], np.uint32), halfway.shape)
        halfway[:] = halfway & np.uint32(0xFFFF0000) | low
        values[:, 6000:] *= 2.0 ** rng.integers(-22, -8, (3, 3001))
        values[:, 3000:][rng.random((3, 6001)) < 0.125] = np.nan  # one in eight values, which are rounded together
        tensors = torch.from_numpy(values)
        for named, tensor, format in (
            (out, tensors[0], dtype),
            (base, tensors[1], from_),
            (anchor, tensors[2], DTYPES[i % 3]),
        ):
            named.append((f"plain{i}", tensor.to(format), None))
    return out, base, anchor


# Number of seeds, a factor of the coefficients, base?, options. By zero noise a weight stays half-way between two.
CALLS = {
    "restore": (0, 1, True, {}),
    "in place": (1, 1, False, {}),
    "stochastic": (1, 1, False, STOCHASTIC),
    "swap": (2, 1, False, {}),
    "decay": (3, 1, True, {"decay": 0.01, **STOCHASTIC}),
    "perturb": (1, 1, True, {}),
    "perturb by zero": (1, 0, True, {}),
    "stochastic by zero": (1, 0, True, STOCHASTIC),
    "swap by zero": (2, 0, True, {}),
    "restore, stochastic": (0, 1, True, STOCHASTIC),
    "update": (5, 1, True, {}),
    "stochastic from a base": (1, 1, True, STOCHASTIC),
    "swap from a base": (2, 1, True, {}),
}
# (call, seeds on the device). Triton compiles for each kind of call, some 10 s.
SAMPLE = {
    "cuda_ptx": [
        ("restore", False),
        ("in place", False),
        ("stochastic", False),
        ("swap", False),
        ("restore", True),
        ("decay", True),
    ],
    "triton_ptx": [("in place", True), ("decay", True)],
}


def outcome(call, backend, weights, bits):
    """What the call leaves in the memory of its tensors and around them, and the fingerprint."""
    n_seeds, factor, with_base, options = CALLS[call]
    coefs = [factor * c for c in COEFS[:n_seeds]]
    out, base, anchor = map(ParamTable, mixture(weights))
    with es_kernels.backend(backend):
        add_noise_(
            out,
            SEEDS[:n_seeds],
            coefs,
            base if with_base else None,
            anchor=anchor if "decay" in options else None,
            **options,
        )
        return [
            bits(torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())).tolist() for t in out.tensors
        ], es_kernels.fingerprint(out)


@pytest.mark.parametrize(
    "kernels, call, on_device",
    [
        pytest.param(kernels, *call, marks=[] if call in SAMPLE[kernels] else pytest.mark.slow)
        for kernels in SAMPLE
        for call in itertools.product(CALLS, (False, True) if kernels == "cuda_ptx" else (True,))
    ],
)
def test_calls_on_a_mixed_table(kernels, call, on_device, weights, bits, request):
    with request.getfixturevalue(kernels)(on_device):
        assert outcome(call, "cpu", weights, bits) == outcome(call, "reference", weights, bits)


@pytest.mark.slow
@pytest.mark.parametrize("n_seeds", (*range(5), 16, 17, 30, 127, 128, 129, 300))
@pytest.mark.parametrize("kernels, on_device", (("cuda_ptx", False), ("cuda_ptx", True), ("triton_ptx", True)))
def test_numbers_of_seeds(kernels, on_device, n_seeds, weights, twin, request):
    """Any number, also past what fits the kernel's parameters and its shared memory; Triton makes another kernel of a
    multiple of 16."""
    use = request.getfixturevalue(kernels)
    for options in ({}, STOCHASTIC, {"decay": 0.1}):
        tensors = [weights(n, DTYPES[i % 3], i) for i, n in enumerate((3, 40, 300))]
        with use(on_device):
            twin(
                lambda *t: add_noise_(
                    {f"w{i}": x for i, x in enumerate(t)}, SEEDS[:n_seeds], COEFS[:n_seeds], **options
                ),
                *tensors,
            )


@pytest.mark.slow
@pytest.mark.parametrize("kernels, on_device", (("cuda_ptx", False), ("cuda_ptx", True), ("triton_ptx", True)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(kernels, on_device, dtype, weights, twin, request):
    use = request.getfixturevalue(kernels)
    for n in range(301):
        with use(on_device):
            twin(
                lambda t: add_noise_(t, SEEDS[0], 0.1, name="w", **(STOCHASTIC if n % 2 else {})), weights(n, dtype, n)
            )


@pytest.mark.slow
@pytest.mark.parametrize("n, options", [(1, {}), (20, STOCHASTIC)], ids=["one", "twenty"])
def test_low_rank_by_tritons_ptx(n, options, weights, bits, triton_ptx):
    """A tile and a bit, by vectors and by elements, beside a tensor that is no matrix. Of twenty seeds sixteen are
    drawn by eights."""
    results = []
    for use in (triton_ptx, None):
        table = ParamTable(
            [
                ("vectors", weights(130 * 136, BF16, 1).reshape(130, 136)),
                ("elements", weights(63, F16, 2).reshape(7, 9)),
            ]
            + [("f32", weights(24 * 64, F32, 3).reshape(24, 64)), ("bias", weights(33, F32, 4))]
        )
        with es_kernels.backend("cpu" if use else "reference"), use() if use else contextlib.nullcontext():
            add_noise_(table, SEEDS[:n], COEFS[:n], noise_rank=1, **options)
            drawn = es_kernels.factors({"a": (7, 300), "b": (40, 1)}, SEEDS[:n], 3, dtype=BF16)
        results.append([*table.tensors, *drawn["a"], *drawn["b"]])
    assert [(bits(a) != bits(b)).sum() for a, b in zip(*results, strict=True)] == [0] * 8


@pytest.mark.slow
@pytest.mark.parametrize("name", ("cuda_ptx", "triton_ptx"))
def test_planted_faults_are_found(name, weights, bits, request, monkeypatch):
    """Of 20 faults in instructions that the calls above execute, drawn by a fixed seed from nvcc's and from Triton's,
    18 or more change a bit, trap or are refused. Where more survive after a change of the kernels, the table lacks what
    their instructions are for."""
    rng = np.random.default_rng(14)
    kernels = request.getfixturevalue(
        {"cuda_ptx": "cuda_ptx_library", "triton_ptx": "triton_ptx_backend"}[name]
    ).kernels
    calls = list(itertools.product(CALLS, (False, True) if name == "cuda_ptx" else (True,)))
    expected = {call: outcome(call, "reference", weights, bits) for call in CALLS}

    def right(call, on_device):
        with request.getfixturevalue(name)(on_device):
            return outcome(call, "cpu", weights, bits) == expected[call]

    calls_of = {}  # (kernel, instruction) -> the calls that execute it
    for call in calls:
        for kernel in kernels.values():
            kernel.decoded.clear()
        assert right(*call)
        for key, kernel in kernels.items():
            for pc in mutants.executed(kernel):
                calls_of.setdefault((key, pc), []).append(call)
    candidates = [(key, pc) for key, pc in calls_of if mutants.faults(kernels[key].code[pc], rng)]
    survivors = []
    for i in rng.choice(len(candidates), 20, replace=False):
        key, pc = candidates[i]
        kernel = kernels[key]
        possible = mutants.faults(kernel.code[pc], rng)
        what, faulty = possible[rng.integers(len(possible))]
        monkeypatch.setitem(kernels, key, mutants.plant(kernel, pc, faulty))
        try:
            found = not all(right(*call) for call in calls_of[key, pc])
        except (interpreter.Trap, interpreter.Unknown):
            found = True
        if not found:
            survivors.append(f"{what} in {kernel.name}: {kernel.code[pc]} -> {faulty}")
        monkeypatch.setitem(kernels, key, kernel)
    assert len(survivors) <= 2, "\n".join(survivors)
