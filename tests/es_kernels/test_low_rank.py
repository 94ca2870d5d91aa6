"""Contract under test: noise of low rank is the same bits on every backend, whatever part of a matrix a call sees.

- cpu == reference, and the kernels for GPUs run on the CPU == reference: ranks, shapes, dtypes, both roundings, decay
  and anchor, numbers of seeds, strided rows, indices near 2^32 and 2^35; memory around the tensor is not touched.
- Shards by rows and columns, and runs cut anywhere, draw what the whole matrix does.
- `factors` gives L and R of which the operation's noise is the product, the same on every backend.
- What is no matrix draws full noise in the same call; noise_rank 0 knows no matrices.

(test_noise.py has NOISE.md and golden vectors, test_errors.py bad input, test_segment.py the cuts.)
"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import es_kernels
from es_kernels import NamedTensor, ParamTable, Segment, add_noise_, factors, noise

from .conftest import ISAS

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16)
ROUNDINGS = ({}, {"rounding": "stochastic", "rounding_seed": 0x9876543210FEDCBA})
SEEDS = [noise.member_seed(2, 0, k) for k in range(300)]
COEFS = np.random.default_rng(1).normal(0, 0.05, 300).tolist()
SHAPES = ((1, 9), (9, 1), (7, 9), (129, 257), (40, 64))  # (40, 64): rows of whole blocks

both_roundings = pytest.mark.parametrize("rounding", ROUNDINGS, ids=("nearest", "stochastic"))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("f32", "bf16", "f16"))


def part(tensor, first, width, name="w"):
    """The contiguous tensor as the elements from `first` on of a matrix of `width` columns."""
    return ParamTable([NamedTensor(name, tensor, [Segment(name, 1, tensor.numel(), first=first, width=width)])])


# ---- cpu == reference ----


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("rank", (1, 2, 3, 8, 20, 64))
def test_ranks_and_shapes(isa, twin, weights, rank, shape):
    for dtype, rounding, n in zip(DTYPES, (*ROUNDINGS, ROUNDINGS[0]), (1, 2, 2), strict=True):
        twin(
            lambda t: add_noise_(t, SEEDS[:n], COEFS[:n], name="w", noise_rank=rank, **rounding),
            weights(shape[0] * shape[1], dtype).reshape(shape),
        )


@both_roundings
@pytest.mark.parametrize("out, base", list(itertools.product(DTYPES, (None, *DTYPES))))
def test_dtypes_and_their_mixtures(isa, twin, weights, out, base, rounding):
    for shape in ((7, 9), (24, 16)):
        live = weights(shape[0] * shape[1], out).reshape(shape)
        master = None if base is None else weights(live.numel(), base, 1).reshape(shape)
        twin(lambda t, m: add_noise_(t, SEEDS[0], 0.01, m, name="w", noise_rank=2, **rounding), live, master)


@both_roundings
@pytest.mark.parametrize("n_seeds", (0, 1, 2, 30, 300))
def test_number_of_seeds(isa, twin, weights, n_seeds, rounding):
    for dtype, rank in ((F32, 1), (BF16, 3)):
        live = weights(17 * 21, dtype).reshape(17, 21)
        twin(
            lambda t: add_noise_(t, SEEDS[:n_seeds], COEFS[:n_seeds], name="w", noise_rank=rank, **rounding),
            live,
        )


@both_roundings
@pytest.mark.parametrize("anchor", (None, *DTYPES))
def test_decay_and_anchor(isa, twin, weights, anchor, rounding):
    for dtype, base, n in itertools.product((F32, BF16), (None, F32), (0, 1, 2)):
        tensors = [
            None if t is None else weights(13 * 8, t, k).reshape(13, 8) for k, t in enumerate((dtype, base, anchor))
        ]
        twin(
            lambda t, m, a: add_noise_(
                t, SEEDS[:n], COEFS[:n], m, name="w", noise_rank=2, decay=0.01, anchor=a, **rounding
            ),
            *tensors,
        )


@both_roundings
@pytest.mark.parametrize("width", (1, 5, 64, (1 << 32) + 8))
def test_indices_near_powers_of_two(isa, twin, weights, width, rounding):
    places = (((1 << 32) - 40, 3), ((1 << 35) - 50, 3), ((1 << 35) - 64, 1), ((1 << 58) - 100, 3))
    for dtype, (first, rank) in itertools.product((F32, BF16), places):
        twin(
            lambda t: add_noise_(part(t, first, width), SEEDS[:2], COEFS[:2], noise_rank=rank, **rounding),
            weights(100, dtype),
        )


@both_roundings
@pytest.mark.parametrize(
    "view", (lambda t: t[:, :13], lambda t: t[3:9, 5:21], lambda t: t[::3], lambda t: t[::2, 8:16], lambda t: t[:, 4:5])
)
def test_strided_rows(isa, twin, weights, bits, view, rounding):
    """A view draws what the contiguous tensor of its values would."""
    for dtype in DTYPES:
        before = weights(800, dtype).reshape(40, 20)
        after = twin(lambda t: add_noise_(t, SEEDS[:2], COEFS[:2], name="w", noise_rank=2, **rounding), view(before))[0]
        contiguous = view(before).clone(memory_format=torch.contiguous_format)
        with es_kernels.backend("reference"):
            add_noise_(contiguous, SEEDS[:2], COEFS[:2], name="w", noise_rank=2, **rounding)
        assert torch.equal(bits(after), bits(contiguous))


def test_a_whole_model_in_one_call(isa, twin, weights):
    """Matrices, a vector, a convolution and a fused tensor whose segments name two matrices and a bias."""
    shapes = {"embed": (300, 16), "norm": (16,), "conv": (4, 3, 5), "wide": (130, 140), "scalar": ()}
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    parts = [
        Segment("q", 6, 10, 0, width=10),
        Segment("k", 4, 10, 60, first=20, width=10),  # rows 2 to 5 of k
        Segment("bias", 1, 10, 100),
    ]

    def call(*tensors):
        named = [NamedTensor(name, t) for name, t in zip(shapes, tensors, strict=False)]
        table = ParamTable([*named, NamedTensor("fused", tensors[-1], parts)])
        add_noise_(table, SEEDS[:3], COEFS[:3], noise_rank=2, **ROUNDINGS[1])

    tensors = [weights(sizes[name], DTYPES[i % 3]).reshape(shape) for i, (name, shape) in enumerate(shapes.items())]
    twin(call, *tensors, weights(110, BF16))


@pytest.mark.parametrize("isa", ISAS, indirect=True)  # a GPU has no threads of ours
@pytest.mark.parametrize("n_seeds, rank", ((1, 8), (1, 64), (3, 3), (40, 1), (3, 64)))
def test_threads_and_wide_matrices(isa, weights, bits, threads, n_seeds, rank):
    """Rows of tiles that several threads share, in runs of columns, are what the columns are as matrices' parts."""
    rows, cols, width = 260, 1100, 100
    before = weights(rows * cols, F32).reshape(rows, cols)
    pieces = []
    for col in range(0, cols, width):
        piece = before[:, col : col + width].clone()
        segment = Segment("w", rows, width, first=col, index_stride=cols, width=cols)
        table = ParamTable([NamedTensor("w", piece, [segment])])
        add_noise_(table, SEEDS[:n_seeds], COEFS[:n_seeds], noise_rank=rank)
        pieces.append(piece)
    for n in (1, 2, 3):
        with threads(n):
            whole = add_noise_(before.clone(), SEEDS[:n_seeds], COEFS[:n_seeds], name="w", noise_rank=rank)
        assert torch.equal(bits(whole), bits(torch.cat(pieces, 1)))


@every_dtype
def test_factors_on_every_instruction_set(isa, bits, dtype):
    shapes = {"a": (40, 8), "b": (1, 3), "c": (7, 130), "empty": (0, 4)}
    for rank, n in ((1, 3), (3, 2), (64, 1), (2, 0)):
        with es_kernels.backend("cpu"):
            ours = factors(shapes, SEEDS[:n], rank, dtype=dtype)
        with es_kernels.backend("reference"):
            theirs = factors(shapes, SEEDS[:n], rank, dtype=dtype)
        assert list(ours) == list(theirs) == list(shapes)
        for name, (rows, cols) in shapes.items():
            for a, b, size in zip(ours[name], theirs[name], (rows, cols), strict=True):
                assert a.shape == (n, size, rank) and a.dtype == dtype and torch.equal(bits(a), bits(b))


# ---- parts of a matrix ----


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_shards_draw_the_noise_of_their_place(weights, bits, data):
    """A matrix cut into row and column shards, each in memory of its own, and cut as a run of elements anywhere."""
    rows, cols, rank = (data.draw(st.integers(1, n)) for n in (150, 140, 3))
    dtype, rounding = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(ROUNDINGS))
    options = {"noise_rank": rank, "decay": 0.01, **rounding}
    before = weights(rows * cols, dtype).reshape(rows, cols)
    whole = add_noise_(before.clone(), SEEDS[:2], COEFS[:2], name="w", **options)

    def cuts(n):
        return sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=3))})

    for (top, bottom), (left, right) in itertools.product(
        itertools.pairwise(cuts(rows)), itertools.pairwise(cuts(cols))
    ):
        shard = before[top:bottom, left:right].clone(memory_format=torch.contiguous_format)
        segment = Segment("w", *shard.shape, first=top * cols + left, index_stride=cols, width=cols)
        add_noise_(ParamTable([NamedTensor("shard", shard, [segment])]), SEEDS[:2], COEFS[:2], **options)
        assert torch.equal(bits(shard), bits(whole[top:bottom, left:right]))
    for start, stop in itertools.pairwise(cuts(rows * cols)):
        run = before.flatten()[start:stop].clone()
        add_noise_(part(run, start, cols), SEEDS[:2], COEFS[:2], **options)
        assert torch.equal(bits(run), bits(whole.flatten()[start:stop]))


@pytest.mark.parametrize("n", (1, 2, 3))
def test_threads_change_nothing(isa, threads, weights, bits, n):
    before = weights(700 * 300, F32).reshape(700, 300)
    results = []
    for count in (1, n):
        with threads(count):
            results.append(add_noise_(before.clone(), SEEDS[:4], COEFS[:4], name="w", noise_rank=1))
    assert torch.equal(bits(results[0]), bits(results[1]))


# ---- what the numbers are ----


@pytest.mark.parametrize("rank", (1, 2, 3, 8, 64))
def test_the_noise_is_the_product_of_the_factors(rank):
    """In float64; the operation rounds once a term, by at most 2^-24 of the largest partial sum."""
    pair = factors({"w": (37, 53)}, SEEDS[:3], rank)["w"]
    left, right = (f.double() for f in pair)
    expected = torch.einsum("kmr,knr,k->mn", left, right, torch.tensor(COEFS[:3]).double()) / rank**0.5
    drawn = add_noise_(torch.zeros(37, 53), SEEDS[:3], COEFS[:3], name="w", noise_rank=rank)
    bound = torch.einsum("kmr,knr->mn", left.abs(), right.abs()).max() * max(map(abs, COEFS[:3]))
    assert (drawn - expected).abs().max() <= (3 * rank + 3) * 2**-24 * bound


def test_factors_are_the_normals_of_two_domains_of_their_own():
    left, right = factors({"w": (5, 4)}, [7, 8], 3)["w"]
    for k, seed in enumerate((7, 8)):
        for factor, n, domain in ((left, 5, 3), (right, 4, 5)):
            drawn = noise.normal(seed, noise.stream_id("w"), np.arange(n * 3, dtype=np.uint64), domain)
            assert factor[k].flatten().tolist() == drawn.tolist()
    assert not {*left.flatten().tolist()} & {*right.flatten().tolist()}


def test_what_is_no_matrix_draws_full_noise(bits):
    vector, cube = torch.zeros(50), torch.zeros(3, 4, 5)
    unnamed = ParamTable([NamedTensor("m", torch.zeros(6, 7), [Segment("m", 6, 7)])])  # no width
    for rank in (1, 64):
        for t, name in ((vector, "v"), (cube, "c")):
            full = add_noise_(t.clone(), SEEDS[:2], COEFS[:2], name=name)
            assert torch.equal(
                bits(add_noise_(t.clone(), SEEDS[:2], COEFS[:2], name=name, noise_rank=rank)), bits(full)
            )
        unnamed.tensors[0].zero_()
        add_noise_(unnamed, SEEDS[:2], COEFS[:2], noise_rank=rank)
        full = add_noise_(torch.zeros(6, 7), SEEDS[:2], COEFS[:2], name="m")
        assert torch.equal(bits(unnamed.tensors[0]), bits(full))


def test_rank_0_knows_no_matrices(bits):
    run = part(torch.zeros(42), 0, 7)
    add_noise_(run, SEEDS[:2], COEFS[:2])
    full = add_noise_(torch.zeros(6, 7), SEEDS[:2], COEFS[:2], name="w", noise_rank=0)
    assert torch.equal(bits(run.tensors[0]), bits(full).flatten())


def test_fingerprints_and_the_next_call_do_not_see_the_rank(bits):
    """One table serves calls of every rank in turn."""
    table, twin = (ParamTable({"m": torch.zeros(9, 11), "v": torch.zeros(5)}) for _ in range(2))
    for rank in (1, 0, 2, 0, 1):
        add_noise_(table, SEEDS[rank], 0.1, noise_rank=rank)
    for rank in (1, 0, 2, 0, 1):
        for name, t in zip(twin.names, twin.tensors, strict=True):
            add_noise_(t, SEEDS[rank], 0.1, name=name, noise_rank=rank)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(table.tensors, twin.tensors, strict=True))
    assert es_kernels.fingerprint(table) == es_kernels.fingerprint(twin)
