"""Contract under test: the ops are good citizens of torch.

They pass torch.library.opcheck, compile without graph breaks to the same bits (bare tensor, dict, ParamTable; seeds and
coefs as numbers and as tensors), bump `_version` of what they write and of nothing else, and accept inference tensors.
"""

import os
import subprocess
import sys

import pytest
import torch

import es_kernels
from es_kernels import ParamTable, add_noise_, factors, fingerprint
from es_kernels.layout import Layout
from es_kernels.low_rank import FactorLayout

SEEDS = [3, (1 << 63) + 5]
STOCHASTIC = {"rounding": "stochastic", "rounding_seed": 9}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_the_import_leaves_torchs_compiler_out():
    """It takes longer than the rest of torch's extras, and only who compiles needs it."""
    program = "import sys, torch; before = set(sys.modules); import es_kernels; print(*(set(sys.modules) - before))"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, check=True)
    assert not [m for m in run.stdout.split() if m.startswith(("torch._dynamo", "torch._inductor", "torch.compiler"))]


# ---- opcheck ----


def op_inputs():
    a, b = torch.randn(100), torch.randn(7, 9).bfloat16()
    key = Layout.intern(("a", "b")).key
    seeds, coefs, rounding = torch.tensor([3, -5]), torch.tensor([0.1, -0.2]), torch.tensor([7])
    none = torch.empty(0, dtype=torch.int64), torch.empty(0)
    base, anchor = [torch.randn(100), torch.randn(7, 9)], [torch.zeros(100), torch.zeros(7, 9)]
    yield "in_place", ([a, b], [], [], seeds, coefs, None, 0.0, key, 0)
    yield "stochastic", ([a, b], [], [], seeds, coefs, rounding, 0.0, key, 0)
    yield "base", ([a, b], base, [], seeds, coefs, None, 0.0, key, 0)
    yield "anchor", ([a, b], base, anchor, seeds, coefs, rounding, 0.1, key, 0)
    yield "restore", ([a, b], base, [], *none, None, 0.0, key, 0)
    yield "empty", ([], [], [], seeds, coefs, None, 0.0, Layout.intern(()).key, 0)
    yield "low_rank", ([a, b], base, anchor, seeds, coefs, rounding, 0.1, key, 3)


@pytest.mark.parametrize("arguments", [a for _, a in op_inputs()], ids=[n for n, _ in op_inputs()])
def test_opcheck_add_noise(arguments):
    torch.library.opcheck(torch.ops.es_kernels.add_noise_.default, arguments)


@pytest.mark.parametrize("n", (0, 2))
def test_opcheck_fingerprint(n):
    tensors = [torch.randn(100), torch.randn(7, 9).bfloat16()][:n]
    torch.library.opcheck(torch.ops.es_kernels.fingerprint.default, (tensors, Layout.intern(("a", "b")[:n]).key))


@pytest.mark.parametrize("matrices", ((), (("a", 7, 9), ("b", 1, 3))))
def test_opcheck_factors(matrices):
    key = FactorLayout.intern(matrices, 3).key
    arguments = (torch.tensor([3, -5]), torch.bfloat16, torch.device("cpu"), key)
    torch.library.opcheck(torch.ops.es_kernels.factors.default, arguments)


def test_schema_says_what_is_written():
    schema = torch.ops.es_kernels.add_noise_.default._schema
    assert [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write] == [
        "out"
    ] and not schema.returns
    for op in (torch.ops.es_kernels.fingerprint, torch.ops.es_kernels.factors):
        assert not any(a.alias_info for a in op.default._schema.arguments)


# ---- torch.compile ----


def compiled(function, backend="aot_eager"):
    return torch.compile(function, fullgraph=True, backend=backend)


def check(bits, function, *tensors, backend="aot_eager"):
    """function(*clones), plain and compiled, twice each: equal bits of all clones."""
    plain, graph = ([t.clone() for t in tensors] for _ in range(2))
    run = compiled(function, backend)
    for _ in range(2):
        function(*plain)
        run(*graph)
    assert all(torch.equal(bits(x), bits(y)) for x, y in zip(plain, graph, strict=True))
    assert not all(torch.equal(bits(x), bits(y)) for x, y in zip(plain, tensors, strict=True))


@pytest.mark.parametrize("backend", ("eager", "aot_eager", "inductor"))
def test_compile_bare_tensor(bits, backend):
    def function(t):
        add_noise_(t, SEEDS, [0.1, -0.2], name="w")
        add_noise_(t, SEEDS[0], 0.1, name="w", **STOCHASTIC)
        add_noise_(t, SEEDS[0], 0.1, name="w", noise_rank=2)

    check(bits, function, torch.randn(10, 10).bfloat16(), backend=backend)


def test_compile_factors(bits):
    def function(x):
        left, right = factors({"w": (3, 7)}, SEEDS, 2, dtype=x.dtype)["w"]
        return (x @ right) @ left.mT

    x = torch.randn(2, 5, 7)
    assert torch.equal(bits(compiled(function)(x)), bits(function(x)))


def test_compile_stream_base_decay_anchor(bits):
    def function(t, base, anchor):
        add_noise_(t, SEEDS, [0.1, -0.2], base, stream=(1 << 63) + 3, decay=0.1, anchor=anchor)

    check(bits, function, torch.randn(7, 9).bfloat16(), torch.randn(7, 9), torch.randn(7, 9).half())


@pytest.mark.parametrize(
    "form", (dict, lambda pairs: list(pairs), lambda pairs: dict(pairs).items()), ids=("dict", "list", "items")
)
def test_compile_named_tensors(bits, form):
    def function(a, b, c, d):
        add_noise_(form([("a", a), ("b", b)]), SEEDS, [0.1, -0.2], {"a": c, "b": d}, **STOCHASTIC)

    check(bits, function, torch.randn(100), torch.randn(7, 9).bfloat16(), torch.randn(100), torch.randn(7, 9))


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compile_table(bits, backend):
    tensors = {"a": torch.randn(100), "b": torch.randn(7, 9).bfloat16()}
    expected = {k: t.clone() for k, t in tensors.items()}
    table = ParamTable(tensors)

    def function(seeds, coefs):
        add_noise_(table, seeds, coefs, **STOCHASTIC)

    run = compiled(function, backend)
    for seeds in ([1, 2], [-3, 4]):
        arguments = torch.tensor(seeds), torch.tensor([0.1, -0.2])
        run(*arguments)
        add_noise_(expected, *arguments, **STOCHASTIC)
        assert all(torch.equal(bits(tensors[k]), bits(expected[k])) for k in tensors)


def test_compile_tensor_seeds_coefs_and_rounding_seed_without_recompilation(bits):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def function(t, seeds, coefs, rounding_seed):
        add_noise_(t, seeds, coefs, name="w", rounding="stochastic", rounding_seed=rounding_seed)

    run = torch.compile(function, fullgraph=True, backend=count)
    plain = torch.randn(50).bfloat16()
    graph = plain.clone()
    for k in range(4):
        arguments = torch.tensor([k, -k]), torch.tensor([0.1, 0.1 * k]), torch.tensor(100 + k)
        add_noise_(plain, *arguments[:2], name="w", rounding="stochastic", rounding_seed=arguments[2])
        run(graph, *arguments)
        assert torch.equal(bits(plain), bits(graph))
    assert len(graphs) == 1


@pytest.mark.parametrize("what", ("base", "anchor"))
def test_compile_refuses_out_as_base_or_anchor(what):
    """A graph writes a copy of out, in which nothing is shared any more."""
    # Of an error inside a graph torch 2.7 shows the type only.
    words = f"'w': {what} shares memory with out" if torch.__version__ >= (2, 8) else "<class 'ValueError'>"
    with pytest.raises(Exception, match=words):
        compiled(lambda t: add_noise_({"w": t}, 1, 1.0, decay=0.1, **{what: {"w": t}}))(torch.randn(8))


def test_compile_intermediate_value(bits):
    """A tensor made inside the graph has no address of its own until it runs."""

    def function(x):
        y = x * 2
        add_noise_(y, SEEDS, [0.1, -0.2], name="w")
        return y + 1

    x = torch.randn(50)
    assert torch.equal(bits(compiled(function)(x)), bits(function(x)))


def test_compile_module_parameters(bits):
    model, twin = torch.nn.Linear(5, 7), torch.nn.Linear(5, 7)
    twin.load_state_dict(model.state_dict())

    def perturb(m):
        with torch.no_grad():
            add_noise_(dict(m.named_parameters()), SEEDS[0], 0.1)

    perturb(model)
    compiled(perturb)(twin)
    assert torch.equal(bits(model.weight), bits(twin.weight)) and torch.equal(bits(model.bias), bits(twin.bias))


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compile_op_fingerprint(backend):
    a, b = torch.randn(100), torch.randn(7, 9).bfloat16()
    key = Layout.intern(("a", "b")).key
    run = compiled(lambda a, b: torch.ops.es_kernels.fingerprint([a, b], key) + 0, backend)
    assert run(a, b).item() & 0xFFFFFFFFFFFFFFFF == fingerprint({"a": a, "b": b})


def test_fake_tensors_take_no_work():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        a = torch.empty(100)
        torch.ops.es_kernels.add_noise_(
            [a], [], [], torch.empty(1, dtype=torch.int64), torch.empty(1), None, 0.0, Layout.intern(("a",)).key, 0
        )
        assert torch.ops.es_kernels.fingerprint([a], Layout.intern(("a",)).key).dtype == torch.int64


# ---- autograd, versions, modes ----


def test_version_of_out_is_bumped_and_of_nothing_else():
    out, base, anchor = torch.zeros(8), torch.zeros(8), torch.zeros(8)
    seeds, coefs = torch.tensor([1]), torch.tensor([1.0])
    add_noise_(out, seeds, coefs, base, name="w", decay=0.1, anchor=anchor)
    assert out._version == 1 and not any(t._version for t in (base, anchor, seeds, coefs))
    whole = torch.zeros(4, 8)
    for named in ({"a": whole[:2], "b": whole[2:]}, ParamTable({"a": whole[:2], "b": whole[2:]})):
        before = whole._version
        add_noise_(named, 1, 1.0)
        assert whole._version == before + 2  # views share their base's counter


def test_backward_through_a_perturbed_weight_is_refused():
    x, w = torch.randn(8, requires_grad=True), torch.randn(8)
    loss = (x * w).sum()
    add_noise_(w, 1, 1.0, name="w")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_tensors(bits):
    with torch.inference_mode():
        t = torch.zeros(40)
        add_noise_(t, 1, 1.0, name="w")
        named = {"w": t, "v": torch.zeros(8)}
        value = fingerprint(named)
    assert torch.equal(bits(t), bits(add_noise_(torch.zeros(40), 1, 1.0, name="w")))
    add_noise_(t, 1, 1.0, name="w")  # outside of inference mode too
    with torch.inference_mode():
        add_noise_(torch.nn.Parameter(torch.zeros(4)), 1, 1.0, name="w")
        table = ParamTable({"w": torch.zeros(40)})
        assert torch.equal(
            bits(add_noise_(table, 1, 1.0).tensors[0]), bits(t - t + add_noise_(torch.zeros(40), 1, 1.0, name="w"))
        )
    add_noise_(table, 1, 1.0)
    assert fingerprint(named) != value


def seen_by_a_dispatch_mode(call):
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(str(op))
            return op(*args, **(kwargs or {}))

    with Mode():
        call()
    return seen


def seen_by_a_function_mode(call):
    from torch.overrides import TorchFunctionMode

    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Mode():
        call()
    return seen


def seen_by_the_profiler(call):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return [event.name for event in profile.events()]


@pytest.mark.parametrize("look", (seen_by_a_dispatch_mode, seen_by_a_function_mode, seen_by_the_profiler))
def test_who_watches_the_dispatcher_sees_calls_on_tables(look, bits):
    """Calls on tables go around it otherwise."""
    t, expected = torch.zeros(40), add_noise_(torch.zeros(40), 1, 1.0, name="w")
    table = ParamTable({"w": t})
    assert any("es_kernels" in name and "add_noise_" in name for name in look(lambda: add_noise_(table, 1, 1.0)))
    assert any("es_kernels" in name and "fingerprint" in name for name in look(lambda: fingerprint(table)))
    assert torch.equal(bits(t), bits(expected)) and t._version == 1


@pytest.mark.parametrize("role", ["out", "base", "anchor"])
def test_a_tensor_subclass_sees_calls_on_its_table(role):
    seen = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return super().__torch_function__(function, types, args, kwargs or {})

    tables = {
        name: ParamTable({"w": torch.zeros(8).as_subclass(Watched if name == role else torch.Tensor)})
        for name in ("out", "base", "anchor")
    }
    seen.clear()
    add_noise_(seeds=1, coefs=1.0, decay=0.1, **tables)
    assert any("add_noise_" in name for name in seen)


def test_returns_out():
    t = torch.zeros(4)
    d, table = {"w": t}, ParamTable({"w": t})
    assert add_noise_(t, 1, 1.0, name="w") is t and add_noise_(d, 1, 1.0) is d and add_noise_(table, 1, 1.0) is table
    assert isinstance(add_noise_(iter([("w", t)]), 1, 1.0), list)


def test_default_dtype_and_device_do_not_matter(bits):
    expected = bits(add_noise_(torch.zeros(8), [1, 2], [0.1, 0.2], name="w", decay=0.1))
    torch.set_default_dtype(torch.float64)
    try:
        got = add_noise_(torch.zeros(8, dtype=torch.float32), [1, 2], [0.1, 0.2], name="w", decay=0.1)
        on_cpu = torch.zeros(8, dtype=torch.float32)
        with torch.device("meta"):
            add_noise_(on_cpu, [1, 2], [0.1, 0.2], name="w", decay=0.1)
            for backend in ("cpu", "reference"):
                with es_kernels.backend(backend):
                    assert fingerprint({"w": on_cpu}) and not fingerprint({})
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(bits(got), expected) and torch.equal(bits(on_cpu), expected)


def test_public_names():
    assert set(es_kernels.__all__) >= {
        "ParamTable",
        "Segment",
        "add_noise_",
        "fingerprint",
        "backend",
        "active_backend",
        "noise",
    }
    assert all(hasattr(es_kernels, n) for n in es_kernels.__all__)
