"""Contract under test: table.py turns named tensors into segments that cover exactly their elements, each once, with
the right index.

- Segments, strides, blocks, the vector path: against an element-by-element list.
- Overlap in memory or in one stream's indices is found if and only if it is there (against brute force).
- Ties keep their first name; empty tensors are nothing; a tensor that is another than it was is an error until
refresh(); layouts are interned.
- A call on tables does the same Python for 300 tensors as for 3, and a table keeps nothing alive but its tensors.
"""

import collections
import copy
import gc
import pathlib
import pickle
import re
import sys
import weakref

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import es_kernels
from es_kernels import NamedTensor, ParamTable, Segment, add_noise_, native, noise, table, watch
from es_kernels.table import Layout

ROOT = pathlib.Path(__file__).parents[2]


def pack_of(*tensors, segments=None, base=(), anchor=()):
    names = tuple(f"t{i}" for i in range(len(tensors)))
    return Layout.intern(names, None, segments).pack(list(tensors), list(base), list(anchor))


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
            address = t.data_ptr() + sum(n * s for n, s in zip(index, t.stride())) * t.element_size()
            found[address] = noise.stream_id(f"t{i}"), k
    return found


def check_units(pack):
    """Units: enough of them for every row's noise blocks, and vector_path only where every unit is a whole aligned
    block."""
    end, size = 0, (4, 2, 2)
    for s in pack.segments:
        rows, cols, first, stride = (int(s[k]) for k in ("rows", "cols", "first", "index_stride"))
        end += rows * int(s["units_per_row"])
        assert s["unit_end"] == end
        touched = [(first + r * stride + cols - 1 >> 3) - (first + r * stride >> 3) + 1 for r in range(rows)]
        assert max(touched) <= s["units_per_row"] <= max(touched) + 1
        if rows == 1:
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


# ---- segments ----


def test_struct_is_that_of_the_header():
    header = ROOT / "csrc" / "segments.h"
    if not header.exists():
        pytest.skip("csrc/ is not here")
    body = re.search(r"struct Segment \{(.*?)\};", header.read_text(), re.S)[1]
    fields = []
    for kind, names in re.findall(r"^\s*(u?int(?:32|64)_t) ([^;]*);", body, re.M):
        fields += [(n.strip(), kind) for n in names.split(",")]
    kinds = {"uint64_t": "u8", "int64_t": "i8", "int32_t": "i4"}
    assert [(n, np.dtype(kinds[k])) for n, k in fields] == [(n, table.SEGMENT[n]) for n in table.SEGMENT.names]
    assert table.SEGMENT.itemsize == 120


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_segments_cover_every_element_once(data):
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

    dtypes = data.draw(st.lists(st.sampled_from(list(table.DTYPES)), min_size=3, max_size=3))
    out, base, anchor = (view(d) for d in dtypes)
    n_extra = data.draw(st.integers(0, 2))
    pack = pack_of(out, base=[base] * (n_extra > 0), anchor=[anchor] * (n_extra > 1))
    assert elements(pack) == expected_elements([out])
    if n_extra:
        assert elements(pack, "base") == expected_elements([base])
    if n_extra > 1:
        assert elements(pack, "anchor") == expected_elements([anchor])
    check_units(pack)
    assert pack.units >= -(-out.numel() // 8) and (pack.units > 0) == (out.numel() > 0)
    for s in pack.segments:
        assert (s["base"] == s["out"]) == (n_extra == 0) and (s["anchor"] == 0) == (n_extra < 2)


def test_a_contiguous_tensor_is_one_row_with_head_body_and_tail():
    t = torch.zeros(4, 100)
    assert pack_of(t).segments[["rows", "cols", "first", "vector_path"]].tolist() == [(1, 400, 0, 1)]
    pack = pack_of(t[0], segments=(((Segment("x", 1, 100, first=5),)),))
    assert pack.segments[["rows", "cols", "first"]].tolist() == [(1, 3, 5), (1, 96, 8), (1, 1, 104)]
    # Contiguous rows whose indices are contiguous too are one row, in whatever shape the caller gives them.
    pack = pack_of(t, segments=((Segment("x", 4, 100, first=8),),))
    assert pack.segments[["rows", "cols", "first"]].tolist() == [(1, 400, 8)]


def test_explicit_segments():
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


@pytest.mark.parametrize("first", ((1 << 35) - 9, (1 << 35) - 8, (3 << 35) - 1, (1 << 64) - 20))
def test_rows_are_cut_where_the_block_number_crosses_2_to_the_32(first):
    t = torch.zeros(20)
    pack = pack_of(t, segments=((Segment("x", 1, 20, first=first),),))
    assert elements(pack) == {t.data_ptr() + 4 * i: (noise.stream_id("x"), first + i) for i in range(20)}
    check_units(pack)


def test_segment_refuses_nonsense():
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
    with pytest.raises(ValueError, match="'t0'.*past the 20 elements"):
        pack_of(torch.zeros(20), segments=((Segment("x", 2, 10, offset=1),),))


def test_too_many_segments_are_refused_not_made():
    t = torch.zeros(2, 300, 300, 2)[:, :, :, :1].permute(2, 1, 0, 3)[:, :, :, :1]
    with pytest.raises(ValueError, match="'t0'.*90000 segments"):
        pack_of(t)


# ---- overlap ----


def intervals(r):
    space, start, rows, length, stride, owner = r
    return [(space, start + k * stride + i) for k in range(rows) for i in range(length)]


ranges = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.integers(0, 60),
        st.integers(1, 4),
        st.integers(1, 6),
        st.sampled_from((0, 1, 4, 7, 10, 10, 10, 13)),
    ).map(lambda r: r if r[2] > 1 else (*r[:4], r[3])),
    min_size=1,
    max_size=5,
)


@settings(max_examples=1500, deadline=None)
@given(ranges, st.sets(st.integers(0, 4)))
@example([(0, 0, 2, 3, 10), (0, 10, 3, 3, 10)], set())  # the second row of the one meets the first of the other
@example([(0, 20, 3, 3, 10), (0, 0, 3, 3, 10)], set())
def test_overlap_is_found_exactly_where_there_is_one(found, readers):
    """Against brute force; two `readers` (base or anchor memory) may meet."""
    found = [(*r, i) for i, r in enumerate(found)]
    may_meet = lambda a, b: a in readers and b in readers  # noqa: E731
    truth = set()
    for i, a in enumerate(found):
        for b in found[:i]:
            if set(intervals(a)) & set(intervals(b)) and not may_meet(a[-1], b[-1]):
                truth.add(frozenset((a[-1], b[-1])))
        if len(set(intervals(a))) < len(intervals(a)) and not may_meet(a[-1], a[-1]):
            truth.add(frozenset((a[-1],)))
    clash = table._find_overlap(found, may_meet)
    assert (clash is None and not truth) or frozenset(clash) in truth


def test_overlapping_memory_is_refused_in_every_role():
    memory = torch.zeros(64)
    a, b, other = memory[:40], memory[30:], torch.zeros(40)
    for arguments in (dict(base=[memory[1:41]]), dict(anchor=[memory[24:]]), dict(base=[other], anchor=[memory[1:41]])):
        with pytest.raises(ValueError, match="'t0': (base|anchor) shares memory with out: "):
            pack_of(a, **arguments)
    with pytest.raises(ValueError, match="'t0' .*'t1' .*overlap in memory"):
        pack_of(a, b)
    with pytest.raises(ValueError, match="'t0' .*'t0' .*overlap in memory"):
        pack_of(torch.zeros(20).expand(3, 20))
    # The rows of out, and one of them, expanded, as base.
    square = torch.zeros(4, 8)
    with pytest.raises(ValueError, match="'t0': base shares memory with out: "):
        pack_of(square, base=[square[1:2].expand(4, 8)])
    with pytest.raises(ValueError, match="'t0': base shares memory with out: "):
        pack_of(memory[:32].view(torch.bfloat16)[:32], base=[memory[:32]])


def test_out_itself_as_base_or_anchor_is_refused():
    """It would change as out is written, so that a restore from it does nothing."""
    memory, other = torch.zeros(8, 16), torch.zeros(8, 16)
    for arguments in (
        dict(base=[memory]),
        dict(base=[memory.view(8, 16)]),
        dict(base=[other], anchor=[memory]),
        dict(anchor=[memory.detach()]),
    ):
        with pytest.raises(ValueError, match="'t0': (base|anchor) shares memory with out: pass a copy, p.clone()"):
            pack_of(memory, **arguments)
    with pytest.raises(ValueError, match="'t1': base shares memory with out's 't0': .*leave base out to add in place"):
        pack_of(memory, other, base=[other.clone(), memory])
    with pytest.raises(ValueError, match="'t0': base shares memory with out: "):  # every other row, in one piece
        pack_of(memory[::2], memory[1::2], base=[memory[::2], memory[1::2]])


def test_what_does_not_overlap_is_accepted():
    memory = torch.zeros(8, 16)
    pack_of(memory[:, :8], memory[:, 8:])  # interleaved, disjoint
    pack_of(memory[::2], base=[memory[1::2]])
    shared = torch.zeros(8, 16)
    pack_of(memory, base=[shared], anchor=[shared])
    pack_of(memory[:4], memory[4:], base=[shared[:4], shared[2:6]])  # reading the same memory twice
    pack_of(memory, base=[torch.zeros(16).expand(8, 16)])


def test_many_interleaved_segments_are_checked_quickly(within):
    """300 x 300 rows in transposed order: each segment's extent meets all others'. Row by row that would be 13 million
    comparisons, not 45,000."""
    t = torch.zeros(300, 300, 8).transpose(0, 1)
    with within(100):
        pack = pack_of(t)
    assert len(pack.segments) == 300


def test_overlapping_index_ranges_of_one_stream_are_refused():
    a, b = torch.zeros(20), torch.zeros(20)
    for first, clash in ((19, True), (20, False)):
        entries = [("a", a, [Segment("w", 1, 20)]), ("b", b, [Segment("w", 1, 20, first=first)])]
        if clash:
            with pytest.raises(ValueError, match="'a' and 'b': overlapping index ranges"):
                ParamTable(entries)
        else:
            ParamTable(entries)
    with pytest.raises(ValueError, match="'a' and 'a': overlapping index ranges"):
        ParamTable([("a", a, [Segment("w", 2, 10, index_stride=9)])])
    ParamTable(
        [("a", a, [Segment("w", 2, 10, index_stride=20)]), ("b", b, [Segment("w", 2, 10, first=10, index_stride=20)])]
    )


# ---- ParamTable ----


def test_ties_keep_their_first_name(bits):
    weight, other = torch.zeros(40), torch.zeros(8)
    t = ParamTable([("embed", weight), ("norm", other), ("head", weight), ("view", weight.view(40))])
    assert t.names == ["embed", "norm"] and t.tied == {"head": "embed", "view": "embed"} and len(t) == 2
    add_noise_(t, 1, 1.0)
    assert torch.equal(bits(weight), bits(add_noise_(torch.zeros(40), 1, 1.0, name="embed")))
    # The same form of call with a dict: noise once, not twice; base by the first name, the others may be there or not.
    again, master = torch.zeros(40), torch.zeros(40)
    add_noise_({"embed": again, "head": again}, 1, 1.0, {"embed": master, "head": master})
    assert torch.equal(bits(again), bits(weight))
    add_noise_({"embed": again, "head": again}, 1, 1.0, {"embed": master})
    assert torch.equal(bits(again), bits(weight))


def test_equal_storage_in_another_shape_is_no_tie_but_an_overlap():
    weight = torch.zeros(40)
    with pytest.raises(ValueError, match="'a' .*'b' .*overlap in memory"):
        ParamTable([("a", weight), ("b", weight.view(5, 8))])


def test_a_name_given_twice():
    with pytest.raises(ValueError, match="'a' is given twice"):
        ParamTable([("a", torch.zeros(4)), ("b", torch.zeros(4)), ("a", torch.zeros(4))])


def test_empty_tensors_are_nothing():
    empty = [("a", torch.zeros(0)), ("b", torch.zeros(3, 0, 2)), ("c", torch.zeros(0, dtype=torch.float16))]
    t = ParamTable(empty)
    assert t.names == ["a", "b", "c"] and t.layout.pack(t.tensors).units == 0
    add_noise_(t, [1, 2], [1.0, 2.0])
    assert es_kernels.fingerprint(t) == es_kernels.fingerprint({}) == es_kernels.fingerprint(ParamTable([])) == 0
    add_noise_({}, 1, 1.0)
    add_noise_(torch.zeros(0), 1, 1.0, name="a")
    full = torch.ones(5)
    assert es_kernels.fingerprint([*empty, ("w", full)]) == es_kernels.fingerprint({"w": full}) != 0


def test_moved_memory_is_an_error_until_refresh(bits):
    p, q = torch.nn.Parameter(torch.zeros(40)), torch.nn.Parameter(torch.zeros(8))
    t = ParamTable([("q", q), ("p", p)])
    old = p.data
    p.data = torch.zeros(40)
    for call in (
        lambda: add_noise_(t, 1, 1.0),
        lambda: es_kernels.fingerprint(t),
        lambda: add_noise_({"p": torch.zeros(40), "q": torch.zeros(8)}, 1, 1.0, t),
    ):
        with pytest.raises(RuntimeError, match="'p' moved.*refresh"), torch.no_grad():
            call()
    assert not old.any() and not p.any() and not q.any()
    with torch.no_grad():
        assert t.refresh() is t
        add_noise_(t, 1, 1.0)
    assert not old.any() and torch.equal(bits(p), bits(add_noise_(torch.zeros(40), 1, 1.0, name="p")))


@pytest.fixture(params=("library", "python"))
def watching(request, monkeypatch):
    """A table's tensors are looked at by libes_cpu.so, or without it."""
    if request.param == "python":
        monkeypatch.setattr(watch, "_asks", lambda: None)
    elif native.why_not("cpu"):
        pytest.skip(native.why_not("cpu"))
    else:
        assert watch._asks() is not None, (
            "libes_cpu.so is of before csrc/tensors.cpp (run `make build`), or torch's C ABI is another"
        )


def into_another_dtype(t):
    t.data = t.data.view(torch.bfloat16)


CHANGES = {
    "moved": lambda t: setattr(t, "data", t.data.clone()),
    "transposed": lambda t: t.t_(),
    "transposed data": lambda t: setattr(t, "data", t.data.t()),
    "another dtype": into_another_dtype,
    "another shape": lambda t: t.resize_(2, 8),
    "more dimensions": lambda t: t.unsqueeze_(0),
    "freed": lambda t: t.untyped_storage().resize_(0),
}


@pytest.mark.parametrize("what", ("out", "base", "anchor"))
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_tensor_that_is_another_than_it_was_is_an_error_until_refresh(watching, change, what, bits):
    named = lambda: {"a": torch.zeros(8), "b": torch.zeros(8, 8)[4:, :4], "c": torch.zeros(4, 4)}  # noqa: E731
    tables = {role: ParamTable(named()) for role in ("out", "base", "anchor")}
    call = lambda: add_noise_(tables["out"], 1, 1.0, tables["base"], decay=0.1, anchor=tables["anchor"])  # noqa: E731
    call()
    before = [bits(t) for t in tables["out"].tensors[:2]]
    change(tables[what].tensors[2])
    for use in (call, lambda: es_kernels.fingerprint(tables[what])):
        with pytest.raises(RuntimeError, match="'c' moved in memory, or changed its dtype or shape.*refresh"):
            use()
    assert all(torch.equal(bits(t), b) for t, b in zip(tables["out"].tensors, before))


def test_a_refreshed_table_is_laid_out_anew(watching, bits):
    out, base = torch.zeros(4, 6), torch.ones(4, 6)
    tables = ParamTable({"w": out}), ParamTable({"w": base})
    add_noise_(tables[0], 1, 1.0, tables[1])
    for t, named in zip((out, base), tables):
        t.data = t.data.clone().reshape(6, 4)
        named.refresh()
    add_noise_(tables[0], 2, 1.0, tables[1])
    assert torch.equal(bits(out), bits(add_noise_(torch.zeros(6, 4), 2, 1.0, torch.ones(6, 4), name="w")))


def test_a_table_keeps_alive_only_its_own_tensors(watching):
    out, base = torch.zeros(8), torch.zeros(8)
    tables = [ParamTable({"w": out}), ParamTable({"w": base})]
    add_noise_(tables[0], 1, 1.0, tables[1])
    kept = [weakref.ref(t.untyped_storage()) for t in (out, base)]
    del base, tables[1]
    gc.collect()
    assert kept[0]() is not None and kept[1]() is None
    del out, tables
    gc.collect()
    assert kept[0]() is None


def test_a_call_on_tables_does_the_same_python_for_300_tensors_as_for_3():
    if native.why_not("cpu"):
        pytest.skip(native.why_not("cpu"))

    def events(n):
        """Calls of functions, in Python and in C, by their names, of one call."""
        live = {f"t{i}": torch.zeros(8, dtype=torch.bfloat16) for i in range(n)}
        tables = ParamTable(live), ParamTable({name: t.float() for name, t in live.items()})
        add_noise_(tables[0], 1, 1.0, tables[1])
        seen = collections.Counter()
        sys.setprofile(
            lambda frame, event, function: seen.update(
                [event if event == "call" else f"{event} {getattr(function, '__name__', '')}"]
            )
        )
        try:
            add_noise_(tables[0], 1, 1.0, tables[1])
        finally:
            sys.setprofile(None)
        return seen

    assert events(300) == events(3)


class Compared(str):
    """A name that counts how often names are compared."""

    n = 0
    __hash__ = str.__hash__

    def __eq__(self, other):
        Compared.n += 1
        return str.__eq__(self, other)


def test_names_are_matched_in_linear_time():
    names = [Compared(f"t{i}") for i in range(200)]
    live, master = ({name: torch.zeros(8) for name in names} for _ in range(2))
    Compared.n = 0
    add_noise_(live, 1, 1.0, dict(reversed(master.items())))
    assert Compared.n <= 10 * len(names)


def test_values_may_change_under_a_table():
    t = torch.zeros(16)
    named = ParamTable({"w": t})
    t.fill_(3)
    add_noise_(named, [], [])
    assert (t == 3).all()


def test_table_of_a_module_and_repr():
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5))
    t = ParamTable(model.named_parameters())
    assert (
        t.names == [n for n, _ in model.named_parameters()] and repr(t) == "ParamTable(4 tensors, 30 elements, 0 tied)"
    )


def test_entries_are_named_tensors(bits):
    a, b = torch.zeros(8), torch.zeros(4, 8)
    part = Segment("whole", 4, 8, first=32)
    t = ParamTable([("a", a), NamedTensor("b", b, [part]), ("tied", a)])
    assert t.entries == [NamedTensor("a", a), NamedTensor("b", b, (part,))] and NamedTensor("a", a).segments is None
    assert all(type(entry) is NamedTensor for entry in t.entries)
    assert ([*t.names], [*map(id, t.tensors)]) == (["a", "b"], [id(a), id(b)])
    add_noise_(t, 1, 1.0)
    other = [torch.zeros_like(a), torch.zeros_like(b)]
    add_noise_(ParamTable([e._replace(tensor=t) for e, t in zip(t.entries, other)]), 1, 1.0)
    assert torch.equal(bits(other[1]), bits(b)) and torch.equal(bits(other[0]), bits(a))
    assert torch.equal(bits(b).flatten(), bits(add_noise_(torch.zeros(64), 1, 1.0, name="whole"))[32:])
    assert es_kernels.fingerprint(t.entries) == es_kernels.fingerprint(t)


def test_table_refuses_what_is_not_a_pair():
    for bad, got in (
        ([("w",)], "tuple"),
        ([("w", torch.zeros(3), None, None)], "tuple"),
        ([torch.zeros(3)], "Tensor"),
        ([("w", [1.0])], r"\(str, list\)"),
        ([(3, torch.zeros(3))], r"\(int, Tensor\)"),
        (["w"], "str"),
    ):
        with pytest.raises(
            TypeError, match=rf"takes \(name, tensor\) pairs, such as model.named_parameters\(\), not {got}"
        ):
            ParamTable(bad)


def test_layouts_are_interned_by_content():
    a = Layout.intern(("x", "y"))
    assert Layout.intern(("x", "y")) is a and Layout.find(a.key) is a
    others = [
        Layout.intern(("y", "x")),
        Layout.intern(("xy",)),
        Layout.intern(("x", "y"), (1, 2)),
        Layout.intern(("x", "y"), None, (None, (Segment("x", 1, 2),))),
    ]
    assert len({a.key, *(o.key for o in others)}) == 5
    with pytest.raises(RuntimeError, match="build its ParamTable first"):
        Layout.find(12345)


def test_a_pack_is_found_again_and_a_changed_tensor_is_not():
    layout, t = Layout.intern(("w",)), torch.zeros(64)
    pack = layout.pack([t], [], [])
    assert layout.pack([t], [], []) is pack
    for other in (t[:32], t.view(8, 8), t.view(torch.bfloat16), t[1:]):
        assert layout.pack([other], [], []) is not pack
    assert layout.pack([t], [t.clone()], []) is not pack


def test_fewer_bytes_than_a_thousandth_of_the_model():
    """One segment is 120 bytes: a 0.5B model of 290 tensors needs 35 kB, of 1 GB."""
    model = {
        f"layers.{i}.{n}": torch.empty(shape, dtype=torch.bfloat16)
        for i in range(4)
        for n, shape in (("q", (896, 896)), ("up", (896, 4864)), ("norm", (896,)))
    }
    pack = ParamTable(model).layout.pack(list(model.values()), [], [])
    assert pack.segments.nbytes < 0.001 * sum(t.nbytes for t in model.values())


def test_one_upload_serves_every_gpu_backend():
    """CUDA and Triton may be asked in turn for the same tensors: what one uploaded must be what the other reads."""
    tensor = torch.zeros(100)
    pack = ParamTable({"w": tensor}).layout.pack([tensor])
    words = pack.on_device()
    assert words is pack.on_device() and words.dtype == torch.int64
    assert words.numpy().tobytes() == pack.segments.tobytes()


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, pickle.dumps], ids=lambda make: make.__name__)
def test_a_copy_of_a_table_is_refused(make):
    """It would know the memory of tensors that are not its own."""
    with pytest.raises(TypeError, match="a ParamTable cannot be copied or pickled, .*: build one of the other tensors"):
        make(ParamTable({"w": torch.zeros(8)}))
