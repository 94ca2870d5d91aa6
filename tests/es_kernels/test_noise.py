"""Contract under test: noise.py, the definition of the noise, and NOISE.md, the page that says the same.

- Philox4x32 is Random123's; streams, member seeds and normals are those of the golden vectors; the page alone suffices
  to compute them.
- Every step is one exactly rounded float32 operation, so C++ and NumPy give the same bits for all 2^18 radii and 2^13
  angles.
- Over all 2^32 words the normals have variance 1, kurtosis 3 and the distribution function of N(0, 1), within stated
  bounds.
- Seeds, streams, neighbouring indices and lanes are uncorrelated.
"""

import hashlib
import itertools
import json
import pathlib
import re
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch

import es_kernels
from bench.noise import fit_noise, make_golden
from es_kernels import noise
from es_kernels.__main__ import GOLDEN

ROOT = pathlib.Path(__file__).parents[2]
VECTORS = json.loads(GOLDEN.read_text())
PAGE = GOLDEN.with_name("NOISE.md").read_text()


def hexadecimal(values):
    return [int(v, 16) for v in values]


# ---- integers ----

PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
KNOWN = [  # Random123 1.14, tests/kat_vectors
    (7, ((0,) * 4, (0,) * 2), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2), (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (7, PI, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    (10, ((0,) * 4, (0,) * 2), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (10, PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize("rounds, given, expected", KNOWN)
def test_philox_gives_the_known_answers_of_random123(rounds, given, expected):
    assert tuple(noise.philox4x32(*given, rounds)) == expected


def test_philox_broadcasts_counters_against_keys():
    (counter, key), expected = PI, KNOWN[-1][2]
    many = noise.philox4x32(np.array([[counter] * 3] * 2), key)
    assert many.shape == (2, 3, 4) and many.dtype == np.uint32 and (many == np.array(expected)).all()


def test_stream_is_the_little_endian_blake2b_of_8_bytes():
    digest = hashlib.blake2b(b"lm_head.weight", digest_size=8).digest()
    assert noise.stream_id("lm_head.weight") == struct.unpack("<Q", digest)[0]
    assert noise.stream_id("lm_head.weight") != struct.unpack("<Q", hashlib.blake2b(b"lm_head.weight").digest()[:8])[0]
    assert {name: f"0x{noise.stream_id(name):016x}" for name in VECTORS["stream_id"]} == VECTORS["stream_id"]


def test_member_seed_is_words_0_and_1_of_domain_1():
    w = noise.philox4x32((5, 1 << 29, 17, 2), (0x89ABCDEF, 0x01234567))
    assert noise.member_seed(0x0123456789ABCDEF, 5, 17, 2) == int(w[0]) + (int(w[1]) << 32)
    for v in VECTORS["member_seed"]:
        assert noise.member_seed(int(v["run_seed"], 16), v["generation"], v["member"], v["purpose"]) == int(
            v["seed"], 16
        )
    assert noise.member_seed(-1, 0, 0) == noise.member_seed((1 << 64) - 1, 0, 0)
    members = [7, 0, 7, 0xFFFFFFFF]
    assert noise.member_seeds(42, 3, members, 1) == [noise.member_seed(42, 3, m, 1) for m in members]
    assert noise.member_seeds(42, 3, []) == []
    everything = {
        noise.member_seed(s, g, m, p) for s in (0, 1, 1 << 32) for g in range(3) for m in range(5) for p in range(4)
    }
    assert len(everything) == 3 * 3 * 5 * 4


def test_domains_and_index_bits_reach_the_counter():
    block = np.uint64((1 << 61) - 1)
    expected = noise.philox4x32((0xFFFFFFFF, 0x1FFFFFFF | 4 << 29, 0x55667788, 0x11223344), (2, 1))
    assert (noise.words((1 << 32) + 2, 0x1122334455667788, block, noise.DOMAIN_ROUNDING) == expected).all()
    assert (
        noise.rounding_thresholds((1 << 32) + 2, 0x1122334455667788, block)
        == [x for w in expected for x in (w & 0xFFFF, w >> 16)]
    ).all()


def test_64_bit_integers_signed_or_unsigned():
    assert noise.u64(-1) == noise.u64((1 << 64) - 1) == (1 << 64) - 1 and noise.u64(-(1 << 63)) == 1 << 63
    for value in (1 << 64, -(1 << 63) - 1):
        with pytest.raises(ValueError, match="64 bits"):
            noise.u64(value)


# ---- golden vectors, and the page ----


@pytest.mark.parametrize("vector", VECTORS["normal"], ids=lambda v: f"{v['seed']}-{v['first']}")
def test_normals_are_golden(vector):
    seed, stream, first = (int(vector[key], 16) for key in ("seed", "stream", "first"))
    index = np.uint64(first) + np.arange(len(vector["bits"]), dtype=np.uint64)
    expected = np.array(hexadecimal(vector["bits"]), np.uint32)
    values = noise.normal(seed, stream, index)
    assert values.dtype == np.float32 and (values.view(np.uint32) == expected).all()
    # Any order and shape of the indices, repeats included.
    order = np.random.default_rng(0).integers(0, len(index), (3, 5))
    assert (noise.normal(seed, stream, index[order]).view(np.uint32) == expected[order]).all()
    assert noise.normal(seed, stream, int(index[0])).view(np.uint32) == expected[0]


def test_golden_vectors_lie_beyond_2_to_the_35_in_every_dtype():
    assert VECTORS["noise_version"] == noise.VERSION
    assert any(int(v["first"], 16) >= 1 << 35 for v in VECTORS["normal"])
    for dtype in ("f32", "bf16", "f16"):
        assert {
            v["rounding_seed"] is None
            for v in VECTORS["add_noise"]
            if v["out"][0] == dtype and int(v["first"], 16) >= 1 << 35
        } == {True, False}


def test_golden_file_and_page_are_what_the_reference_makes():
    vectors = make_golden.golden()
    stale = "run `python -m bench.noise.make_golden`"
    assert GOLDEN.read_text() == make_golden.as_text(vectors), stale
    assert PAGE == make_golden.page(PAGE, vectors), stale


def test_constants_on_the_page_are_those_of_the_code():
    block = re.search(r"<!-- constants -->\n```python\n(.*?)```\n<!-- end -->", PAGE, re.S)[1]
    found = {}
    for name, values, decimals in re.findall(r"^(\w+) = \(?([0-9A-Fx, ]+?)\)?(?:  # (.*))?$", block, re.M):
        found[name] = [int(v, 16) for v in values.split(", ")]
        if decimals:
            assert [int(np.float32(d).view(np.uint32)) for d in decimals.split(", ")] == found[name]
    for name in ("LOG", "LOG_SLOPE", "RSQRT", "COS", "SIN"):
        assert np.atleast_1d(np.array(getattr(noise, name), np.float32)).view(np.uint32).tolist() == found[name]
    assert [noise.RSQRT_SEED] == found["RSQRT_SEED"] and len(found) == 6


@pytest.fixture(scope="module")
def page():
    """The names that NOISE.md's Python blocks define: an implementation of their own, with exact fractions, without
    NumPy."""
    names = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.S)), names)
    return names


def test_page_alone_gives_the_integers(page):
    for v in VECTORS["philox4x32"]:
        assert list(page["philox4x32"](hexadecimal(v["counter"]), hexadecimal(v["key"]), v["rounds"])) == hexadecimal(
            v["words"]
        )
    for name, stream in VECTORS["stream_id"].items():
        assert page["stream_id"](name) == int(stream, 16)
    for v in VECTORS["member_seed"]:
        assert page["member_seed"](int(v["run_seed"], 16), v["generation"], v["member"], v["purpose"]) == int(
            v["seed"], 16
        )


@pytest.mark.parametrize("vector", VECTORS["normal"], ids=lambda v: f"{v['seed']}-{v['first']}")
def test_page_alone_gives_the_normals(page, vector):
    seed, stream, first = (int(vector[key], 16) for key in ("seed", "stream", "first"))
    assert [page["bits"](page["noise"](seed, stream, first + i)) for i in range(len(vector["bits"]))] == hexadecimal(
        vector["bits"]
    )


def test_page_alone_gives_the_operation(page):
    """The golden results whose operands are finite, by the order on the page."""
    size = {"f32": 32, "bf16": 16, "f16": 16}

    def load(dtype, bits):
        if dtype == "f16":
            return struct.unpack("<e", struct.pack("<H", bits))[0]
        return page["f32"](bits << 32 - size[dtype])

    compared = 0
    for v in VECTORS["add_noise"] + VECTORS["low_rank"]:
        stream, coefs = page["stream_id"](v["name"]), [page["f32"](c) for c in hexadecimal(v["coefs"])]
        decay, fma = page["f32"](int(v["decay"], 16)), page["fma"]
        for i, (base, expected) in enumerate(zip(hexadecimal(v["base"][1]), hexadecimal(v["out"][1]), strict=True)):
            index = int(v["first"], 16) + i
            b = load(v["base"][0], base)
            anchor = 0.0 if v["anchor"] is None else load(v["anchor"][0], int(v["anchor"][1][i], 16))
            if not np.isfinite([b, anchor]).all() or abs(b) > 3e38 or b == 0 or abs(anchor) > 3e38:
                continue
            if decay:
                b = fma(-decay, page["rounded"](Fraction(b) - Fraction(anchor)), b)

            def add(coef, seed, x, v=v, stream=stream, index=index):
                if "noise_rank" not in v:
                    return page["fma"](coef, page["noise"](seed, stream, index), x)
                row, column = divmod(index, v["width"])
                return page["low_rank_terms"](coef, seed, stream, row, column, v["noise_rank"], x)

            members = list(zip(coefs, hexadecimal(v["seeds"]), strict=True))
            if len(members) > 1:
                acc = 0.0
                for coef, seed in members[:-1]:
                    acc = add(coef, seed, acc)
                b = page["rounded"](Fraction(b) + Fraction(acc))
            if members:
                b = add(*members[-1], b)
            if v["rounding_seed"] is not None and v["out"][0] != "f32":
                r = page["threshold"](int(v["rounding_seed"], 16), stream, index)
                got = page[f"{v['out'][0]}_stochastic"](b, r)
            elif v["out"][0] == "f32":
                got = page["bits"](b)
            else:
                dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[v["out"][0]]
                got = torch.tensor(b).to(dtype).view(torch.int16).item() & 0xFFFF
            assert got == expected
            compared += 1
    assert compared > 100


def test_page_alone_gives_the_factors(page):
    for v in VECTORS["factors"]:
        seed, stream, r = int(v["seed"], 16), page["stream_id"](v["name"]), v["noise_rank"]
        for side, n in (("left", v["rows"]), ("right", v["cols"])):
            drawn = [page["bits"](page[side](seed, stream, i, q, r)) for i in range(n) for q in range(r)]
            assert drawn == hexadecimal(v[side])


def test_page_alone_gives_the_fingerprint(page):
    for v in VECTORS["fingerprint"]:
        dtype, stream = ("f32", "bf16", "f16").index(v["tensor"][0]), page["stream_id"](v["name"])
        terms = (
            page["fingerprint_term"](b, dtype, stream, int(v["first"], 16) + i)
            for i, b in enumerate(hexadecimal(v["tensor"][1]))
        )
        assert sum(terms) % (1 << 64) == int(v["fingerprint"], 16)


# ---- fma ----


def f32(bits):
    return float(np.uint32(bits).view(np.float32))


def exact_fma(a, b, c):
    """fma of float32 in exact fractions: to nearest, ties to even. Results that are zero or infinite are not asked
    for."""
    q = Fraction(a) * Fraction(b) + Fraction(c)
    e = abs(q.numerator).bit_length() - q.denominator.bit_length()
    e -= abs(q) < Fraction(2) ** e
    quantum = Fraction(2) ** max(e - 23, -149)
    return float(round(q / quantum) * quantum)


def ties():
    """(a, b, c) whose exact a * b + c lies within 2^-60 of a tie between two float32: float64 alone rounds them to the
    tie, then wrongly."""
    for exponent in (-100, -3, 0, 20, 100):
        for odd in (0, 1):  # the float32 below the tie has an even or an odd last bit
            big = (1 + odd * 2.0**-23) * 2.0**exponent
            for side in (-1, 1):
                for sign in (-1, 1):
                    for tiny in (2.0**-40, 2.0**-45, 2.0**-47):
                        # half an ulp of `big`, times (1 +- tiny), as a product of two float32
                        for a in (1 + 2.0**-12, 1 + 2.0**-20, 1.0):
                            half = Fraction(2) ** (exponent - 24)
                            b = np.float32(float(half * (1 + side * Fraction(tiny)) / Fraction(a)))
                            yield sign * a, float(b), sign * big
                    # (1 + 2^-23)(1 - 2^-23) = 1 - 2^-46: the classic
                    yield sign * (1 + 2.0**-23), (1 - 2.0**-23) * 2.0 ** (exponent - 24), sign * big
                    yield sign * (1 + 2.0**-23), (1 + 2.0**-23) * 2.0 ** (exponent - 24), sign * side * big


def test_fma_rounds_once_on_constructed_ties():
    cases = [c for c in ties() if abs(c[0] * c[1]) > 2.0**-120]
    a, b, c = np.array(cases).T.astype(np.float32)
    expected = np.array([exact_fma(*map(float, case)) for case in zip(a, b, c, strict=True)], np.float32)
    assert (noise.fma(a, b, c).view(np.uint32) == expected.view(np.uint32)).all()
    twice = (a.astype(np.float64) * b + c).astype(np.float32)
    assert (twice != expected).sum() > 20, "the cases do not tell one rounding from two"


def test_fma_on_random_operands_and_subnormal_results():
    rng = np.random.default_rng(0)
    a, b, c = (np.float32(rng.normal(size=2000) * 2.0 ** rng.integers(-74, -50, 2000)) for _ in range(3))
    c = np.float32(c * 2.0 ** rng.integers(-80, -60, 2000))
    expected = np.array([exact_fma(*map(float, case)) for case in zip(a, b, c, strict=True)], np.float32)
    assert (expected != 0).all() and (np.abs(expected) < 2.0**-126).sum() > 100
    assert (noise.fma(a, b, c).view(np.uint32) == expected.view(np.uint32)).all()


def test_fma_of_zeros_infinities_and_nan():
    inf, nan = np.inf, np.nan
    cases = [
        (0.0, 1.0, -0.0),
        (-0.0, 1.0, -0.0),
        (1.0, 1.0, -1.0),
        (inf, 1.0, 1.0),
        (inf, 0.0, 1.0),
        (inf, 1.0, -inf),
        (1.0, 1.0, -inf),
        (nan, 1.0, 1.0),
        (3e38, 3e38, -inf),
        (3e38, 2.0, 0.0),
    ]
    expected = [0.0, -0.0, 0.0, inf, nan, nan, -inf, nan, -inf, inf]
    for case, value in zip(cases, expected, strict=True):
        got = noise.fma(*map(np.float32, case))
        assert got.dtype == np.float32 and got.shape == ()
        assert np.isnan(got) if np.isnan(value) else (got == value and np.signbit(got) == np.signbit(value)), case


# ---- the transform: C++ equals NumPy on every radius and every angle ----


def cpu_normals(seed, stream, n):
    out = torch.zeros(n)
    with es_kernels.backend("cpu"):
        es_kernels.add_noise_(out, seed, 1.0, stream=stream)
    return out.numpy()


def test_every_radius_and_every_angle_is_the_same_in_cpp(isa):
    """C++ makes words only by Philox, so a stretch of noise long enough to meet every one of the 2^18 radii and 2^13
    angles, each with both signs and in both halves, is compared whole. (x and y are each one product of a radius and an
    angle factor.)"""
    blocks = 1_000_000
    words = noise.words(3, 5, np.arange(blocks, dtype=np.uint64), noise.DOMAIN_NOISE).reshape(-1)
    assert len(np.unique(words >> np.uint32(14))) == 1 << 18 and len(np.unique(words & np.uint32(0x3FFF))) == 1 << 14
    x, y = (v.view(np.uint32) for v in noise.box_muller(words))
    values = cpu_normals(3, 5, 8 * blocks).view(np.uint32)
    # 0 + 1 * noise is the noise, but for -0.
    assert (values[0::2] == x).all() and (values[1::2] == y).all()


# ---- the distribution, by enumeration ----


def test_quality_over_all_words():
    figures = fit_noise.quality()
    assert abs(figures["variance - 1"]) <= 1e-5
    assert abs(figures["kurtosis - 3"]) <= 1e-4
    assert figures["CDF error"] <= 5e-5
    assert figures["largest"] <= 5.14


def test_the_enumeration_measures_what_it_should(monkeypatch):
    """The figures agree with a plain sample of 2^23 words, and double if the noise is doubled."""
    r, x, y = fit_noise.enumerate_factors()
    words = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    radius, angle = words >> np.uint32(14), words >> np.uint32(1) & np.uint32(0x1FFF)
    sign = 1 - 2 * (words & np.uint32(1)).astype(float)
    got = noise.box_muller(words)
    for value, factor in zip(got, (x, y), strict=True):
        assert np.allclose(value, sign * r[radius] * factor[angle], rtol=1e-5, atol=1e-7)
    monkeypatch.setattr(noise, "COS", tuple(np.float32(1.001) * c for c in noise.COS))
    assert fit_noise.quality()["variance - 1"] > 1.9e-3


def test_log_is_positive_and_the_normals_finite_everywhere():
    w = np.arange(1 << 18, dtype=np.uint32) << np.uint32(14)
    x, y = noise.box_muller(w | np.uint32(0x1FFF << 1))
    assert np.isfinite(x).all() and np.isfinite(y).all()
    x, y = noise.box_muller(w | np.uint32(4096 << 1))  # t = 1: x is r
    assert (x > 0).all(), "v <= 0 would flip the sign of r, or make it infinite"
    # As u grows r falls, but for the joints of the log's pieces and its last float32 steps, where it may stand still or
    # wiggle.
    assert (np.diff(x) < 0).mean() > 0.95


def test_pairs_lie_on_16384_rays_and_stay_under_5_14():
    angles = np.arange(1 << 14, dtype=np.uint32)
    assert len(np.unique(np.stack(noise.box_muller(angles), -1), axis=0)) == 16384  # one radius: as many pairs as rays
    r0 = np.abs(np.concatenate(noise.box_muller(np.arange(1 << 14, dtype=np.uint32)))).max()
    assert 5 < r0 <= 5.14 and "16384 rays" in PAGE and "|x| <= 5.14" in PAGE
    x, y = noise.box_muller(np.uint32(2 * np.random.default_rng(0).integers(0, 1 << 31, 1000)))
    minus_x, minus_y = noise.box_muller(np.uint32(2 * np.random.default_rng(0).integers(0, 1 << 31, 1000) + 1))
    assert (minus_x == -x).all() and (minus_y == -y).all(), "bit 0 is the sign of the pair"


# ---- correlation: n samples of two independent normals correlate by less than 5 / sqrt(n), and so do their squares
# ----

N = 1 << 19


def stretch(seed, stream, first=0, n=N):
    """n values from index `first` on; a stream is a u64 or a name (then with any `first`)."""
    out = torch.zeros(n)
    with es_kernels.backend("cpu"):
        if isinstance(stream, int):
            es_kernels.add_noise_(out, seed, 1.0, stream=stream)
        else:
            es_kernels.add_noise_(
                es_kernels.ParamTable([(stream, out, [es_kernels.Segment(stream, 1, n, first=first)])]), seed, 1.0
            )
    return out.numpy().astype(np.float64)


def assert_uncorrelated(a, b):
    bound = 5 / np.sqrt(len(a))
    for f in (lambda x: x, np.square, np.sign, lambda x: (np.abs(x) > 2) * 4.5):
        fa, fb = f(a), f(b)
        assert abs(np.corrcoef(fa, fb)[0, 1]) < bound


@pytest.mark.parametrize("bit", (0, 1, 31, 32, 63))
def test_seeds_are_uncorrelated(bit):
    assert_uncorrelated(stretch(12345, 77), stretch(12345 ^ 1 << bit, 77))


@pytest.mark.parametrize("bit", (0, 1, 31, 32, 63))
def test_streams_are_uncorrelated(bit):
    assert_uncorrelated(stretch(12345, 77), stretch(12345, 77 ^ 1 << bit))


def test_seed_and_stream_are_not_interchangeable():
    assert_uncorrelated(stretch(1, 2), stretch(2, 1))


@pytest.fixture(scope="module")
def sides():
    """sides(seed, name) -> n values each of its full noise and of a left and a right factor of rank 8."""

    def draw(seed, name, n=N):
        with es_kernels.backend("cpu"):
            pair = es_kernels.factors({name: (n // 8, n // 8)}, seed, 8)[name]
        return [stretch(seed, name, 0, n), *(f.flatten().numpy().astype(np.float64) for f in pair)]

    return draw


def test_sides_are_uncorrelated(sides):
    """L and R, with each other, with full noise, and with those of another seed and another stream."""
    drawn = [values for seed in (7, 7 ^ 1 << 63) for name in ("v", "w") for values in sides(seed, name)]
    for a, b in itertools.combinations(drawn, 2):
        assert_uncorrelated(a, b)
    for values in drawn:
        bound = 5 / np.sqrt(len(values))
        assert abs(values.mean()) < bound and abs(values.var() - 1) < np.sqrt(2) * bound


@pytest.mark.parametrize("rank", (1, 2, 8))
def test_elements_of_low_rank_have_mean_0_and_variance_1(rank):
    """Over seeds; two elements of a row or column are uncorrelated, though they share a factor. The variance of an
    element's square is 8 for rank 1, 2 + 6 / rank in general."""
    n = 4096
    with es_kernels.backend("cpu"):
        left, right = (f.double() for f in es_kernels.factors({"w": (4, 6)}, list(range(n)), rank)["w"])
    drawn = ((left @ right.mT) / rank**0.5).flatten(1).numpy()
    assert (np.abs(drawn.mean(0)) < 5 / np.sqrt(n)).all()
    assert (np.abs((drawn**2).mean(0) - 1) < 5 * np.sqrt((2 + 6 / rank) / n)).all()
    correlation = drawn.T @ drawn / n - np.diag((drawn**2).mean(0))
    assert np.abs(correlation).max() < 5.5 * np.sqrt((1 + 2 / rank) / n)


def test_neighbouring_indices_are_uncorrelated():
    values = stretch(7, 7)
    for lag in (*range(1, 17), 64, 1024, 4096):
        assert_uncorrelated(values[:-lag], values[lag:])
    blocks = values.reshape(-1, 8)
    for i in range(8):
        for j in range(i):
            bound = 5 / np.sqrt(len(blocks))
            assert abs(np.corrcoef(blocks[:, i], blocks[:, j])[0, 1]) < bound
            # x^2 and y^2 of a pair share the radius; Box-Muller makes them independent all the same.
            assert abs(np.corrcoef(blocks[:, i] ** 2, blocks[:, j] ** 2)[0, 1]) < bound
            assert abs((np.sign(blocks[:, i]) * np.sign(blocks[:, j])).mean()) < bound


def test_stretches_2_to_the_35_apart_are_uncorrelated():
    n = 1 << 16
    start = stretch(7, "x", 0, n)
    for first in (1 << 32, 1 << 35, 1 << 63):
        assert_uncorrelated(start, stretch(7, "x", first, n))


def test_mean_and_variance_of_a_stretch():
    values = stretch(2**63 + 5, 11)
    assert abs(values.mean()) < 5 / np.sqrt(N) and abs(values.var() - 1) < 5 * np.sqrt(2 / N)


def test_noise_itself_has_no_subnormal_operand():
    """Flush-to-zero in the calling thread changes nothing in NumPy either."""
    index = np.arange(1 << 16, dtype=np.uint64)
    plain = noise.normal(1, 2, index).view(np.uint32)
    assert torch.set_flush_denormal(True)
    try:
        flushed = noise.normal(1, 2, index).view(np.uint32)
    finally:
        torch.set_flush_denormal(False)
    assert (plain == flushed).all()
