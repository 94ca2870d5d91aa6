"""Contract under test: segment.py cuts tensors into segments that cover exactly their elements, each once, with the
right index: segments, strides, blocks and the vector path against an element-by-element list."""

import hashlib
import pathlib
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from es_kernels import Segment, low_rank, native, noise, segment

ROOT = pathlib.Path(__file__).parents[2]


def elements(pack, what="out"):
    """{address: (stream, index)} of all elements, by the definition of Segment; asserts that none occurs twice."""
    size, found = (4, 2, 2), {}
    for s in pack.segments:
        for row in range(s["rows"]):
            for col in range(s["cols"]):
                address = int(s[what]) + (row * int(s[f"{what}_stride"]) + col) * size[s[f"{what}_dtype"]]
                assert address not in found
                found[address] = int(s["stream"]), (int(s["first"]) + row * int(s["index_stride"]) + col) % (1 << 64)
    return found


def expected_elements(tensors):
    found = {}
    for i, t in enumerate(tensors):
        for k, index in enumerate(np.ndindex(*t.shape)):  # row-major
            address = t.data_ptr() + sum(n * s for n, s in zip(index, t.stride(), strict=True)) * t.element_size()
            found[address] = noise.stream_id(f"t{i}"), k
    return found


def check_units(pack):
    """Units: enough of them for every row's noise blocks, or whole tiles of a rectangle of a matrix, which come first;
    and vector_path only where every unit is a whole aligned block."""
    end, size = 0, (4, 2, 2)
    for s in pack.segments:
        rows, cols, first, stride, width = (int(s[k]) for k in ("rows", "cols", "first", "index_stride", "width"))
        if width:
            assert first % width + cols <= width and (rows == 1 or stride % width == 0)
            assert s["units_per_row"] == -(-cols // 128) * 2048 and end % 2048 == 0
            end += -(-rows // 128) * int(s["units_per_row"])
        else:
            end += rows * int(s["units_per_row"])
            touched = [(first + r * stride + cols - 1 >> 3) - (first + r * stride >> 3) + 1 for r in range(rows)]
            assert max(touched) <= s["units_per_row"] <= max(touched) + 1
        assert s["unit_end"] == end
        if rows == 1 and not width:
            assert (first >> 35) == (first + cols - 1 >> 35), "a block number crosses a multiple of 2^32"
            assert s["units_per_row"] == touched[0]
        whole = all((first + r * stride) % 8 == 0 for r in range(rows)) and cols % 8 == 0
        aligned = all(
            (int(s[w]) + r * int(s[f"{w}_stride"]) * size[s[f"{w}_dtype"]]) % 16 == 0
            for w in ("out", "base", "anchor")
            if s[w]
            for r in range(rows)
        )
        assert bool(s["vector_path"]) == (whole and aligned)


HEADER = ROOT / "csrc/es_kernels.h"
needs_header = pytest.mark.skipif(not HEADER.exists(), reason="csrc/ is not here")


@needs_header
@pytest.mark.parametrize(
    "struct, dtype, size",
    (("EsSegment", segment.SEGMENT, 128), ("EsFactor", low_rank.FACTOR, 40)),
    ids=("EsSegment", "EsFactor"),
)
def test_struct_is_that_of_the_header(struct, dtype, size):
    body = re.search(rf"typedef struct \{{([^}}]*)\}} {struct};", HEADER.read_text())[1]
    fields = []
    for kind, names in re.findall(r"^\s*(u?int(?:32|64)_t) ([^;]*);", body, re.M):
        fields += [(n.strip(), kind) for n in names.split(",")]
    kinds = {"uint64_t": "u8", "int64_t": "i8", "int32_t": "i4"}
    assert [(n, np.dtype(kinds[k])) for n, k in fields] == [(n, dtype[n]) for n in dtype.names]
    assert dtype.itemsize == size


@needs_header
def test_numbers_are_those_of_the_header():
    header = HEADER.read_text()
    numbers = {name: int(value) for name, value in re.findall(r"\bES_(\w+) (?:= )?(\d+)\b", header)}
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    assert {dtype: numbers[name] for name, dtype in dtypes.items()} == segment.DTYPES
    assert (numbers["ABI"], numbers["TILE"], numbers["MAX_RANK"]) == (native.ABI, segment.TILE, low_rank.MAX_RANK)
    assert f"L (domain {noise.DOMAIN_LEFT}) or R (domain {noise.DOMAIN_RIGHT})" in header


@needs_header
def test_a_declaration_changes_with_the_abi():
    words = re.sub(r"/\*.*?\*/", " ", HEADER.read_text(), flags=re.S)
    words = re.sub(r"\s*(\W)\s*", r"\1", " ".join(words.split()))
    digest = hashlib.sha256(words.encode()).hexdigest()[:16]
    assert (native.ABI, digest) == (3, "e715849160af25b1"), (
        "a declaration of es_kernels.h changed: raise ES_ABI there and ABI in es_kernels/native.py, then put both "
        "here; the digest alone if no compiled caller can tell, as of an argument's name"
    )


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_segments_cover_every_element_once(pack_of, data):
    """Any strided view whose last dimension is contiguous, with a base and an anchor that have strides of their own."""
    shape = tuple(data.draw(st.lists(st.integers(0, 5), min_size=0, max_size=4))) + data.draw(
        st.sampled_from(((), (1,), (7,), (8,), (16,), (24,)))
    )

    def view(dtype):
        padded = [n + data.draw(st.sampled_from((0, 0, 1, 8))) for n in shape]
        order = data.draw(st.permutations(range(max(0, len(shape) - 1)))) + ([len(shape) - 1] if shape else [])
        memory = torch.zeros(int(np.prod([padded[i] for i in order], dtype=int)) + 8, dtype=dtype)[
            data.draw(st.sampled_from((0, 1, 4, 8))) :
        ]
        count = int(np.prod(padded, dtype=int))
        if memory.numel() < count:
            memory = torch.zeros(count, dtype=dtype)
        t = memory[:count].reshape([padded[i] for i in order])
        t = t.permute([order.index(i) for i in range(len(shape))])
        return t[tuple(slice(0, n) for n in shape)]

    dtypes = data.draw(st.lists(st.sampled_from(list(segment.DTYPES)), min_size=3, max_size=3))
    out, base, anchor = (view(d) for d in dtypes)
    n_extra, matrices = data.draw(st.integers(0, 2)), data.draw(st.booleans())
    pack = pack_of(out, base=[base] * (n_extra > 0), anchor=[anchor] * (n_extra > 1), matrices=matrices)
    assert (pack.segments["width"] == (shape[1] if matrices and len(shape) == 2 else 0)).all()
    assert elements(pack) == expected_elements([out])
    if n_extra:
        assert elements(pack, "base") == expected_elements([base])
    if n_extra > 1:
        assert elements(pack, "anchor") == expected_elements([anchor])
    check_units(pack)
    assert pack.units >= -(-out.numel() // 8) and (pack.units > 0) == (out.numel() > 0)
    for s in pack.segments:
        assert (s["base"] == s["out"]) == (n_extra == 0) and (s["anchor"] == 0) == (n_extra < 2)


def test_a_contiguous_tensor_is_one_row_with_head_body_and_tail(pack_of):
    t = torch.zeros(4, 100)
    assert pack_of(t).segments[["rows", "cols", "first", "vector_path"]].tolist() == [(1, 400, 0, 1)]
    pack = pack_of(t[0], segments=(((Segment("x", 1, 100, first=5),)),))
    assert pack.segments[["rows", "cols", "first"]].tolist() == [(1, 3, 5), (1, 96, 8), (1, 1, 104)]
    # Contiguous rows whose indices are contiguous too are one row, in whatever shape the caller gives them.
    pack = pack_of(t, segments=((Segment("x", 4, 100, first=8),),))
    assert pack.segments[["rows", "cols", "first"]].tolist() == [(1, 400, 8)]


def test_explicit_segments(pack_of):
    t = torch.zeros(16, 8, dtype=torch.bfloat16)
    segments = (
        Segment("a", 2, 8, first=40),
        Segment("b", 3, 5, offset=16, row_stride=8, first=1 << 35, index_stride=24),
        Segment("a", 0, 8),
        Segment("b", 4, 0),
    )
    pack = pack_of(t, segments=(segments,))
    a, b, p = noise.stream_id("a"), noise.stream_id("b"), t.data_ptr()
    expected = {p + 2 * i: (a, 40 + i) for i in range(16)} | {
        p + 2 * (16 + 8 * r + c): (b, (1 << 35) + 24 * r + c) for r in range(3) for c in range(5)
    }
    assert elements(pack) == expected
    check_units(pack)


def test_a_run_of_a_matrix_is_the_end_of_a_row_whole_rows_and_a_beginning(pack_of):
    def cut(n, width, first):
        pack = pack_of(torch.zeros(n), segments=((Segment("x", 1, n, first=first, width=width),),), matrices=True)
        check_units(pack)
        return pack.segments[["rows", "cols", "first"]].tolist()

    assert cut(40, 9, 4) == [(1, 5, 4), (3, 9, 9), (1, 8, 36)]
    assert cut(40, 10, 20) == [(4, 10, 20)]
    assert cut(3, 10, 4) == [(1, 3, 4)]
    assert cut(8, 10, 4) == [(1, 6, 4), (1, 2, 10)]
    assert cut(5, 1, 7) == [(5, 1, 7)]


def test_matrices_come_first_and_all_else_is_as_ever(pack_of):
    tensors = torch.zeros(11), torch.zeros(129, 3), torch.zeros(2, 3, 4), torch.zeros(1, 300)
    pack = pack_of(*tensors, matrices=True)
    assert pack.segments[["rows", "cols", "width", "unit_end"]].tolist() == [
        (129, 3, 3, 2 * 2048),
        (1, 300, 300, 5 * 2048),
        (1, 8, 0, 5 * 2048 + 1),
        (1, 3, 0, 5 * 2048 + 2),
        (1, 24, 0, 5 * 2048 + 5),
    ]
    assert elements(pack) == elements(pack_of(*tensors)) == expected_elements(tensors)


@pytest.mark.parametrize("first", ((1 << 35) - 9, (1 << 35) - 8, (3 << 35) - 1, (1 << 64) - 20))
def test_rows_are_cut_where_the_block_number_crosses_2_to_the_32(pack_of, first):
    t = torch.zeros(20)
    pack = pack_of(t, segments=((Segment("x", 1, 20, first=first),),))
    assert elements(pack) == {t.data_ptr() + 4 * i: (noise.stream_id("x"), first + i) for i in range(20)}
    check_units(pack)


def test_segment_refuses_nonsense(pack_of):
    for bad in (
        dict(rows=-1, cols=2),
        dict(rows=1, cols=2, offset=-1),
        dict(rows=1, cols=2, first=-1),
        dict(rows=2, cols=2, index_stride=-2),
    ):
        with pytest.raises(ValueError, match="'w'.*negative"):
            Segment("w", **bad)
    with pytest.raises(ValueError, match="'w'.*2\\^64"):
        Segment("w", 1, 10, first=(1 << 64) - 9)
    for width, bad in (
        (0, dict(rows=1, cols=1)),
        (-8, dict(rows=1, cols=8)),
        (8, dict(rows=2, cols=8, index_stride=12)),  # no multiple of the width
        (8, dict(rows=2, cols=8, first=1, index_stride=16)),  # across the end of a row, but no run
        (8, dict(rows=2, cols=9, index_stride=16)),
        (8, dict(rows=2, cols=16, row_stride=20)),  # a run in the stream, but not in memory
        (1 << 59, dict(rows=1, cols=8)),
        (1, dict(rows=1, cols=8, first=1 << 58)),
    ):
        with pytest.raises(ValueError, match="'w'.*(width|rows and columns)"):
            Segment("w", width=width, **bad)
    with pytest.raises(ValueError, match="'t0'.*past the 20 elements"):
        pack_of(torch.zeros(20), segments=((Segment("x", 2, 10, offset=1),),))


def test_too_many_segments_are_refused_not_made(pack_of):
    t = torch.zeros(2, 300, 300, 2)[:, :, :, :1].permute(2, 1, 0, 3)[:, :, :, :1]
    with pytest.raises(ValueError, match="'t0'.*90000 segments"):
        pack_of(t)
