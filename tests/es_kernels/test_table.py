"""Contract under test: a ParamTable knows its tensors by name and by memory.

- Ties keep their first name; empty tensors are nothing; what is not (name, tensor) is refused.
- A table made of a table keeps its segments and ties.
- A tensor that is another than it was is an error until refresh().
- A call on tables does the same Python for 300 tensors as for 3, and a table keeps nothing alive but its tensors.
"""

import collections
import copy
import gc
import pickle
import sys
import weakref

import pytest
import torch

import es_kernels
from es_kernels import NamedTensor, ParamTable, Segment, add_noise_, native, watch


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
    assert all(torch.equal(bits(t), b) for t, b in zip(tables["out"].tensors, before, strict=False))


def test_a_refreshed_table_is_laid_out_anew(watching, bits):
    out, base = torch.zeros(4, 6), torch.ones(4, 6)
    tables = ParamTable({"w": out}), ParamTable({"w": base})
    add_noise_(tables[0], 1, 1.0, tables[1])
    for t, named in zip((out, base), tables, strict=True):
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
    add_noise_(ParamTable([e._replace(tensor=t) for e, t in zip(t.entries, other, strict=True)]), 1, 1.0)
    assert torch.equal(bits(other[1]), bits(b)) and torch.equal(bits(other[0]), bits(a))
    assert torch.equal(bits(b).flatten(), bits(add_noise_(torch.zeros(64), 1, 1.0, name="whole"))[32:])
    assert es_kernels.fingerprint(t.entries) == es_kernels.fingerprint(t)


def test_a_table_of_a_table_is_that_table_again():
    a, b = torch.zeros(8), torch.zeros(4, 8)
    t = ParamTable([("a", a), NamedTensor("b", b, [Segment("whole", 4, 8, first=32)]), ("tied", a)])
    again = ParamTable(t)
    assert again.entries == t.entries and again.layout is t.layout and again.tied == t.tied == {"tied": "a"}


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


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, pickle.dumps], ids=lambda make: make.__name__)
def test_a_copy_of_a_table_is_refused(make):
    """It would know the memory of tensors that are not its own."""
    with pytest.raises(TypeError, match="a ParamTable cannot be copied or pickled, .*: build one of the other tensors"):
        make(ParamTable({"w": torch.zeros(8)}))
