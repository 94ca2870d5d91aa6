"""Contract under test: layout.py refuses tensors that overlap in memory or draw the same noise, in whatever role they
are given; layouts are interned by content; a pack is made once, is small, and serves every backend."""

import pytest
import torch

from es_kernels import ParamTable, Segment
from es_kernels.layout import Layout


def test_overlapping_memory_is_refused_in_every_role(pack_of):
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


def test_out_itself_as_base_or_anchor_is_refused(pack_of):
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


def test_what_does_not_overlap_is_accepted(pack_of):
    memory = torch.zeros(8, 16)
    pack_of(memory[:, :8], memory[:, 8:])  # interleaved, disjoint
    pack_of(memory[::2], base=[memory[1::2]])
    shared = torch.zeros(8, 16)
    pack_of(memory, base=[shared], anchor=[shared])
    pack_of(memory[:4], memory[4:], base=[shared[:4], shared[2:6]])  # reading the same memory twice
    pack_of(memory, base=[torch.zeros(16).expand(8, 16)])


def test_many_interleaved_segments_are_checked_quickly(pack_of, within):
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
