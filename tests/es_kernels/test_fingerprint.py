"""Contract under test: fingerprint is one 64-bit sum over (bits, dtype, stream, index) of all elements.

The same on every backend and instruction set, and in csrc/cuda.cu run on the CPU (golden vectors); blind to order,
sharding and memory layout; seeing every single change of a bit, and swaps, dtypes, names and indices. A change of one
element is seen with certainty, others up to 2^-32 or so.
"""

import json

import pytest
import torch

import es_kernels
from es_kernels import ParamTable, Segment, fingerprint, noise
from es_kernels.__main__ import GOLDEN

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("f32", "bf16", "f16"))


def integers(tensor):
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


@every_dtype
def test_cpu_equals_reference(isa, twin, weights, dtype):
    for size in (*range(34), 127, 128, 129, 70_001):
        storage = weights(size + 3, dtype, size)
        for offset in (0, 1, 3):
            twin(lambda t: fingerprint({"w": t}), storage[offset : offset + size])
    for first in (5, (1 << 32) - 20, (1 << 35) - 20, (1 << 64) - 100):
        twin(lambda t: fingerprint(ParamTable([("w", t, [Segment("w", 1, 100, first=first)])])), weights(100, dtype))
    twin(lambda t: fingerprint({"w": t}), weights(800, dtype).reshape(40, 20)[::2, 3:16])
    strided = Segment("w", 4, 300, row_stride=301, first=(1 << 35) - 20, index_stride=1003)
    twin(lambda t: fingerprint(ParamTable([("w", t, [strided])])), weights(4 * 301, dtype))


def test_mixture_of_dtypes(isa, twin, weights):
    twin(
        lambda *t: fingerprint({f"w{i}": x for i, x in enumerate(t)}),
        *(weights(50 + i, DTYPES[i % 3], i) for i in range(6)),
    )


def test_formula(weights):
    """NOISE.md's formula in NumPy integers (the page's own text is run in test_noise.py)."""
    t = weights(21, torch.bfloat16)
    total = 0
    for i, b in enumerate(integers(t).tolist()):
        w = noise.words(1, noise.stream_id("w"), i >> 3, 2, rounds=7).tolist()
        lane = i & 7
        add = w[(lane + 1) & 3] if lane < 4 else w[(lane + 2) & 3]
        word = w[lane & 3]
        multiply = (word if lane < 4 else (word << 16 | word >> 16) & 0xFFFFFFFF) | 1
        total += ((b & 0xFFFF) + add) % (1 << 32) * multiply
    assert fingerprint({"w": t}) == total % (1 << 64)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_golden(backend):
    vectors = json.loads(GOLDEN.read_text())["fingerprint"]
    for v in vectors:
        dtype, bits = v["tensor"]
        dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[dtype]
        values = [int(b, 16) for b in bits]
        half = 1 << (31 if dtype == torch.float32 else 15)
        t = torch.tensor(
            [b - 2 * half if b >= half else b for b in values],
            dtype=torch.int32 if dtype == torch.float32 else torch.int16,
        ).view(dtype)
        with es_kernels.backend(backend):
            assert fingerprint(
                ParamTable([("w", t, [Segment("w", 1, len(values), first=int(v["first"], 16))])])
            ) == int(v["fingerprint"], 16)
    assert len(vectors) == 9


def test_is_an_unsigned_64_bit_int(weights):
    values = [fingerprint({f"w{i}": torch.ones(100)}) for i in range(64)]
    assert all(type(v) is int and 0 <= v < 1 << 64 for v in values) and len(set(values)) == 64
    assert any(v >> 63 for v in values) and any(not v >> 63 for v in values)
    for bit in range(64):
        assert 10 <= sum(v >> bit & 1 for v in values) <= 54  # every bit is in use


@every_dtype
def test_order_sharding_and_layout_do_not_matter(weights, dtype):
    t, other = weights(360, dtype).reshape(12, 30), weights(77, torch.float16, 1)
    whole = fingerprint({"a": t, "b": other})
    assert fingerprint([("b", other), ("a", t)]) == whole
    assert fingerprint({"a": t.reshape(360), "b": other.reshape(7, 11)}) == whole
    padded = torch.zeros(12, 40, dtype=dtype)[:, 5:35]
    padded.copy_(t)
    integers(padded)[:] = integers(t)
    assert fingerprint({"a": padded, "b": other}) == whole
    left, right = t[:, :13].contiguous(), t[:, 13:].contiguous()
    shards = [
        ("r", right, [Segment("a", 12, 17, first=13, index_stride=30)]),
        ("b", other),
        ("l", left, [Segment("a", 12, 13, index_stride=30)]),
    ]
    assert fingerprint(ParamTable(shards)) == whole
    # And of workers that each hold a part: the sum of their sums.
    parts = [ParamTable([("l", left, [Segment("a", 12, 13, index_stride=30)])]), ParamTable(shards[:2])]
    assert sum(map(fingerprint, parts)) % (1 << 64) == whole
    assert fingerprint({"a": t, "tied": t, "b": other}) == whole


@every_dtype
def test_every_single_bit_is_seen(weights, dtype):
    """Every bit of every element of three blocks: each changed table has its own value."""
    t = weights(24, dtype)
    n_bits = 8 * t.element_size()
    values = {fingerprint({"w": t})}
    for i in range(24):
        for bit in range(n_bits):
            changed = t.clone()
            integers(changed)[i] ^= (1 << bit) - (1 << n_bits if bit == n_bits - 1 else 0)
            values.add(fingerprint({"w": changed}))
    assert len(values) == 1 + 24 * n_bits


def test_swaps_names_dtypes_and_indices_are_seen():
    t = torch.arange(1, 41, dtype=torch.int16).view(torch.bfloat16)
    values = {fingerprint({"w": t})}
    for i in range(40):
        for j in range(i):
            swapped = t.clone()
            swapped[i], swapped[j] = t[j].clone(), t[i].clone()
            values.add(fingerprint({"w": swapped}))
    assert len(values) == 1 + 40 * 39 // 2
    zeros = torch.zeros(40)
    others = [
        {"v": t},
        {"w": t.view(torch.float16)},
        {"w": t.view(torch.float32)},
        {"w": t[:39]},
        {"w": t[1:]},
        {"w": t.flip(0)},
        {"w": zeros},
        {"w": zeros.bfloat16()},
    ]
    others += [{"w": zeros[:8]}, {"w": zeros[:16]}, {"w": -zeros}, {"v": zeros}]
    others += [ParamTable([("w", t, [Segment("w", 1, 40, first=first)])]) for first in (1, 8, 1 << 32, 1 << 35)]
    values |= {fingerprint(o) for o in others}
    assert len(values) == 1 + 40 * 39 // 2 + len(others)


def test_moving_a_value_between_tensors_is_seen():
    a, b = torch.ones(8), torch.full((8,), 2.0)
    assert fingerprint({"a": a, "b": b}) != fingerprint({"a": b, "b": a})


def test_nothing_is_written_and_nan_payloads_count(weights, bits):
    t = weights(100, torch.float32)
    before, version = bits(t), t._version
    first = fingerprint({"w": t})
    assert fingerprint({"w": t}) == first and torch.equal(bits(t), before) and t._version == version
    assert fingerprint({"w": torch.tensor([0x7FC00000], dtype=torch.int32).view(torch.float32)}) != fingerprint(
        {"w": torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)}
    )
    p = torch.nn.Parameter(torch.ones(5))  # reading a leaf that requires grad is fine
    assert fingerprint({"p": p}) == fingerprint({"p": torch.ones(5)})


def test_flush_denormal(weights):
    t = torch.arange(300, dtype=torch.int32).view(torch.float32)
    plain = fingerprint({"w": t})
    assert torch.set_flush_denormal(True)
    try:
        for backend in ("cpu", "reference"):
            with es_kernels.backend(backend):
                assert fingerprint({"w": t}) == plain
    finally:
        torch.set_flush_denormal(False)
