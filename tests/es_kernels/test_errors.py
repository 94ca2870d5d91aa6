"""Contract under test: bad input is a clear Python error that names the tensor, and nothing is written.

Each call here has a good tensor first, so that an implementation that writes as it goes would be seen.
"""

import pathlib
import resource
import warnings

import numpy as np
import pytest
import torch

import es_kernels
from es_kernels import ParamTable, Segment, add_noise_, backends, factors, fingerprint, native
from es_kernels.backends import cpu as cpu_backend

GOOD = "model.good"
BAD = "model.bad"


@pytest.fixture
def refused(bits):
    """refused(error, pattern, call, *watched): call() raises, and the watched tensors keep their bits and versions."""

    def check(error, pattern, call, *watched):
        before = [(bits(t), t._version) for t in watched]
        with pytest.raises(error, match=pattern):
            call()
        for t, (old, version) in zip(watched, before, strict=True):
            assert torch.equal(bits(t), old) and t._version == version

    return check


@pytest.fixture
def good():
    return torch.linspace(-1, 1, 37)


# ---- tensors that cannot be parameters ----

UNSUITABLE = {
    "int32": (lambda: torch.zeros(8, dtype=torch.int32), TypeError, "dtype torch.int32"),
    "uint8": (lambda: torch.zeros(8, dtype=torch.uint8), TypeError, "dtype torch.uint8"),
    "bool": (lambda: torch.zeros(8, dtype=torch.bool), TypeError, "dtype torch.bool"),
    "complex": (lambda: torch.zeros(8, dtype=torch.complex64), TypeError, "dtype torch.complex64"),
    "float64": (lambda: torch.zeros(8, dtype=torch.float64), TypeError, "dtype torch.float64"),
    "float8": (lambda: torch.zeros(8, dtype=torch.float8_e4m3fn), TypeError, "dtype torch.float8"),
    "sparse_coo": (lambda: torch.eye(4).to_sparse(), TypeError, "sparse"),
    "sparse_csr": (lambda: torch.eye(4).to_sparse_csr(), TypeError, "sparse"),
    "meta": (lambda: torch.empty(8, device="meta"), ValueError, "meta device"),
    "last_dimension_strided": (lambda: torch.zeros(8, 8).t(), ValueError, "not contiguous in its last dimension"),
    "every_other_element": (lambda: torch.zeros(16)[::2], ValueError, "not contiguous in its last dimension"),
    "expanded_rows": (lambda: torch.zeros(8).expand(3, 8), ValueError, "overlap in memory"),
    "expanded_columns": (lambda: torch.zeros(8, 1).expand(8, 3), ValueError, "not contiguous in its last dimension"),
    "negated_view": (lambda: torch._neg_view(torch.zeros(8)), ValueError, "negated"),
    "freed_storage": (lambda: freed(torch.zeros(8)), ValueError, "no memory"),
    # Its address is 12, not 0
    "freed_storage_of_a_part": (lambda: freed(torch.zeros(11)[3:]), ValueError, "no memory"),
}
every_unsuitable = pytest.mark.parametrize("make, error, pattern", UNSUITABLE.values(), ids=UNSUITABLE)


def freed(t):
    """As FSDP leaves a parameter between uses: a shape, but no bytes."""
    t.untyped_storage().resize_(0)
    return t


@every_unsuitable
def test_unsuitable_out(refused, good, make, error, pattern):
    pattern = rf"'{BAD}'.*({pattern})"
    for form in (dict, list, ParamTable):
        refused(error, pattern, lambda: add_noise_(form([(GOOD, good), (BAD, make())]), 1, 1.0), good)
        refused(error, pattern, lambda: fingerprint(form([(GOOD, good), (BAD, make())])), good)
    refused(error, pattern, lambda: add_noise_(make(), 1, 1.0, name=BAD))


@every_unsuitable
def test_unsuitable_base_and_anchor(refused, good, make, error, pattern):
    bad = make()
    if "overlap" in pattern or "negated" in pattern:
        return  # reading a row many times is fine, and torch itself resolves what is only read
    out = torch.zeros(bad.shape)
    for what, options in (("base", {}), ("anchor", {"decay": 0.1})):
        named = rf"'{BAD}'.*{what}.*({pattern})" if "contiguous" not in pattern else rf"'{BAD}'.*({pattern})"
        refused(
            error,
            named,
            lambda: add_noise_({GOOD: good, BAD: out}, 1, 1.0, **{what: {GOOD: good, BAD: bad}}, **options),
            good,
            out,
        )
        refused(error, named, lambda: add_noise_(out, 1, 1.0, **{what: bad}, name=BAD, **options), out)


# ---- names ----


def test_bare_tensor_needs_a_name_or_a_stream(refused, good):
    refused(ValueError, "name= or stream=", lambda: add_noise_(good, 1, 1.0), good)
    refused(ValueError, "name= or stream=", lambda: add_noise_(good, 1, 1.0, name="w", stream=3), good)
    for stream in (1 << 64, -(1 << 63) - 1):
        refused(ValueError, "64 bits", lambda: add_noise_(good, 1, 1.0, stream=stream), good)
    refused(ValueError, "for a bare tensor", lambda: add_noise_({GOOD: good}, 1, 1.0, name="w"), good)
    refused(ValueError, "for a bare tensor", lambda: add_noise_(ParamTable({GOOD: good}), 1, 1.0, stream=1), good)


def test_unnamed_tensors_are_refused(refused, good):
    model = torch.nn.Linear(3, 3)
    for unnamed in (
        [good],
        (good, good.clone()),
        iter([good]),
        [(GOOD, good), good],
        model.parameters(),
        [[GOOD, good]],
        [(3, good)],
    ):
        refused(TypeError, "unnamed tensors|pairs", lambda: add_noise_(unnamed, 1, 1.0), good, *model.parameters())
    refused(TypeError, "unnamed tensors", lambda: fingerprint([good]))
    refused(TypeError, "unnamed tensors", lambda: fingerprint(good))
    refused(TypeError, "base.*unnamed tensors", lambda: add_noise_({GOOD: good}, 1, 1.0, [good]), good)
    refused(TypeError, f"pairs|'{BAD}'", lambda: add_noise_({GOOD: good, BAD: None}, 1, 1.0), good)


def test_a_model_is_no_named_tensors(refused, good):
    for model in (
        torch.nn.Linear(3, 3),
        torch.nn.Sequential(torch.nn.Linear(3, 3)),
        torch.nn.ParameterDict({"w": good.clone()}),
    ):
        words = f"a {type(model).__name__} is no named tensors: pass model.named_parameters"
        for call in (
            lambda m: add_noise_(m, 1, 1.0),
            lambda m: add_noise_({GOOD: good}, 1, 1.0, m),
            fingerprint,
            ParamTable,
        ):
            refused(TypeError, words, lambda: call(model), good, *model.parameters())
    refused(
        TypeError,
        "such as model.named_parameters.., not Parameter",
        lambda: ParamTable(torch.nn.Linear(3, 3).parameters()),
    )


def test_overlap_and_names_given_twice(refused, good):
    twice = [(GOOD, good[:20]), (BAD, good[10:])]
    refused(ValueError, f"'{GOOD}'.*'{BAD}'.*overlap in memory", lambda: add_noise_(twice, 1, 1.0), good)
    same = [(BAD, good[:10]), (BAD, good[10:])]
    refused(ValueError, f"'{BAD}' is given twice", lambda: add_noise_(same, 1, 1.0), good)
    clash = [("a", good[:10], [Segment("w", 1, 10)]), ("b", good[10:], [Segment("w", 1, 27, first=9)])]
    refused(ValueError, "'a' and 'b'.*overlapping index ranges", lambda: add_noise_(ParamTable(clash), 1, 1.0), good)


# ---- base and anchor ----


@pytest.mark.parametrize("what", ("base", "anchor"))
def test_base_and_anchor_must_match_out(refused, good, what):
    bad = torch.zeros(8)

    def call(value, out=None):
        return add_noise_({GOOD: good, BAD: bad} if out is None else out, 1, 1.0, **{what: value}, decay=0.1)

    refused(
        ValueError,
        f"'{BAD}'.*{what} has shape \\(9,\\).*out has \\(8,\\)",
        lambda: call({GOOD: good.clone(), BAD: torch.zeros(9)}),
        good,
        bad,
    )
    refused(
        ValueError, f"'{BAD}'.*{what} has shape", lambda: call({GOOD: good.clone(), BAD: torch.zeros(2, 4)}), good, bad
    )
    refused(ValueError, f"{what}.*'{BAD}' is missing", lambda: call({GOOD: good.clone()}), good, bad)
    refused(
        ValueError,
        f"{what}.*'x' is not in out",
        lambda: call({GOOD: good.clone(), BAD: bad.clone(), "x": bad.clone()}),
        good,
        bad,
    )
    refused(TypeError, f"{what}.*form of out", lambda: call(bad.clone()), good, bad)
    refused(
        TypeError,
        f"{what}.*form of out",
        lambda: add_noise_(bad, 1, 1.0, name=BAD, decay=0.1, **{what: {BAD: bad.clone()}}),
        bad,
    )
    refused(
        ValueError,
        f"'{BAD}': {what} shares memory",
        lambda: add_noise_(good[:30], 1, 1.0, name=BAD, decay=0.1, **{what: good[1:31]}),
        good,
    )
    meta = torch.empty(8, device="meta")
    refused(ValueError, f"'{BAD}'.*{what}.*meta", lambda: call({GOOD: good.clone(), BAD: meta}), good, bad)


@pytest.mark.parametrize("what", ("base", "anchor"))
@pytest.mark.parametrize("form", (dict, list, ParamTable))
def test_base_or_anchor_in_the_memory_of_out(refused, good, form, what):
    """`{n: p.float() ...}` of float32 weights holds the weights themselves: a restore from them would do nothing."""
    live = {GOOD: good.bfloat16(), BAD: torch.zeros(8)}
    master = {n: p.float() for n, p in live.items()}
    call = lambda seeds, coefs: add_noise_(form(live.items()), seeds, coefs, **{what: form(master.items())}, decay=0.1)  # noqa: E731
    words = (
        f"'{BAD}': {what} shares memory with out: pass a copy, p.clone\\(\\)"
        + ", or leave base out to add in place" * (what == "base")
    )
    refused(ValueError, words, lambda: call(1, 1.0), *live.values())
    refused(ValueError, words, lambda: call([], []), *live.values())
    refused(
        ValueError,
        f"'{GOOD}': {what} shares memory",
        lambda: add_noise_(good, 1, 1.0, name=GOOD, decay=0.1, **{what: good}),
        good,
    )


def test_explicit_segments_need_equal_strides(refused):
    out, base = torch.zeros(4, 8), torch.zeros(4, 9)[:, :8]
    table = ParamTable([(BAD, out, [Segment(BAD, 4, 8)])])
    refused(ValueError, f"'{BAD}'.*strides", lambda: add_noise_(table, 1, 1.0, {BAD: base}), out)


# ---- numbers ----


@pytest.mark.parametrize(
    "seeds, coefs",
    (
        ([1, 2], [1.0]),
        ([1], [1.0, 2.0]),
        ([], [1.0]),
        (1, []),
        (torch.arange(3), torch.ones(2)),
        (torch.arange(3), [1.0]),
    ),
)
def test_seeds_and_coefs_of_different_lengths(refused, good, seeds, coefs):
    refused(ValueError, r"\d seeds but \d coefs", lambda: add_noise_(good, seeds, coefs, name=GOOD), good)


@pytest.mark.parametrize(
    "value", (float("nan"), float("inf"), -float("inf"), 1e39, 3.4028235677973366e38, -4e38), ids=str
)
def test_numbers_that_are_not_finite_in_float32(refused, good, value):
    refused(ValueError, "not a finite float32", lambda: add_noise_(good, [1, 2], [1.0, value], name=GOOD), good)
    refused(ValueError, "not a finite float32", lambda: add_noise_(good, 1, 1.0, name=GOOD, decay=value), good)
    on_cpu = torch.tensor([1.0, value], dtype=torch.float64).float()
    refused(ValueError, "not all finite", lambda: add_noise_(good, [1, 2], on_cpu, name=GOOD), good)


def test_largest_finite_float32_is_accepted(good):
    for largest in (3.4028234663852886e38, 3.4028235e38, -3.4028235677973362e38):
        add_noise_(good, 1, largest, name=GOOD)


@pytest.mark.parametrize("seed", (1 << 64, (1 << 64) + 5, -(1 << 63) - 1, 1 << 70, -(1 << 70)), ids=hex)
def test_seeds_beyond_64_bits(refused, good, seed):
    refused(ValueError, "seeds: .*64 bits", lambda: add_noise_(good, seed, 1.0, name=GOOD), good)
    refused(ValueError, "seeds: .*64 bits", lambda: add_noise_(good, [1, seed], [1.0, 1.0], name=GOOD), good)
    refused(
        ValueError,
        "rounding_seed: .*64 bits",
        lambda: add_noise_(good, 1, 1.0, name=GOOD, rounding="stochastic", rounding_seed=seed),
        good,
    )


@pytest.mark.parametrize(
    "seeds",
    (1.0, [1.5], "1", torch.ones(1), torch.ones(1, dtype=torch.int32), torch.ones(1, 1, dtype=torch.int64), None),
    ids=repr,
)
def test_seeds_of_the_wrong_kind(refused, good, seeds):
    refused(TypeError, None, lambda: add_noise_(good, seeds, 1.0, name=GOOD), good)
    if seeds is not None:  # as a rounding_seed, None is none
        refused(
            TypeError,
            None,
            lambda: add_noise_(good, 1, 1.0, name=GOOD, rounding="stochastic", rounding_seed=seeds),
            good,
        )


@pytest.mark.parametrize(
    "seeds, coefs",
    ((1e-3, 42), ([1e-3, 2e-3], [1, 2]), (torch.ones(2), torch.arange(2)), (np.float32(1e-3), 42)),
    ids=repr,
)
def test_seeds_and_coefs_in_the_other_order(refused, good, seeds, coefs):
    for call in (
        lambda: add_noise_(good, seeds, coefs, name=GOOD),
        lambda: add_noise_(ParamTable({GOOD: good}), seeds, coefs),
    ):
        refused(TypeError, r"^seeds .*the order is add_noise_\(out, seeds, coefs\)", call, good)


@pytest.mark.parametrize(
    "coefs",
    (
        torch.ones(1, dtype=torch.float64),
        torch.ones(1, dtype=torch.bfloat16),
        torch.ones(1, 1),
        torch.ones(1, dtype=torch.int64),
        None,
        [None],
    ),
    ids=repr,
)
def test_coefs_of_the_wrong_kind(refused, good, coefs):
    refused(TypeError, None, lambda: add_noise_(good, 1, coefs, name=GOOD), good)


@pytest.mark.parametrize(
    "rank, error",
    ((-1, ValueError), (65, ValueError), (1 << 70, ValueError), (1.0, TypeError), ("1", TypeError)),
    ids=repr,
)
def test_noise_rank(refused, good, rank, error):
    matrix = good[:36].view(6, 6)
    for named in (ParamTable({GOOD: matrix}), {GOOD: matrix}):
        refused(error, "noise_rank is .*not", lambda named=named: add_noise_(named, 1, 1.0, noise_rank=rank), good)
    with pytest.raises(error, match="noise_rank is .*not"):
        factors({GOOD: (6, 6)}, 1, rank)


def test_factors_that_cannot_be():
    with pytest.raises(ValueError, match="noise_rank is 1 to 64, not 0"):
        factors({GOOD: (6, 6)}, 1, 0)
    with pytest.raises(ValueError, match=f"'{BAD}': -1 x 6"):
        factors({GOOD: (6, 6), BAD: (-1, 6)}, 1, 1)
    with pytest.raises(TypeError, match="float64"):
        factors({GOOD: (6, 6)}, 1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="seeds: .*64 bits"):
        factors({GOOD: (6, 6)}, 1 << 64, 1)


def test_rounding_and_its_seed(refused, good):
    refused(
        ValueError, "needs a rounding_seed", lambda: add_noise_(good, 1, 1.0, name=GOOD, rounding="stochastic"), good
    )
    refused(ValueError, "nearest' takes none", lambda: add_noise_(good, 1, 1.0, name=GOOD, rounding_seed=1), good)
    refused(
        ValueError,
        "'nearest' or 'stochastic', not 'up'",
        lambda: add_noise_(good, 1, 1.0, name=GOOD, rounding="up"),
        good,
    )
    for two in ([1, 2], torch.arange(2), []):
        refused(
            ValueError,
            "one number",
            lambda: add_noise_(good, 1, 1.0, name=GOOD, rounding="stochastic", rounding_seed=two),
            good,
        )


def test_numbers_on_another_device(refused, good):
    seeds, coefs = torch.zeros(1, dtype=torch.int64, device="meta"), torch.zeros(1, device="meta")
    refused(ValueError, "seeds are on the meta", lambda: add_noise_(good, seeds, 1.0, name=GOOD), good)
    refused(ValueError, "coefs are on the meta", lambda: add_noise_(good, 1, coefs, name=GOOD), good)
    refused(
        ValueError,
        "rounding_seed are on the meta",
        lambda: add_noise_(good, 1, 1.0, name=GOOD, rounding="stochastic", rounding_seed=seeds),
        good,
    )


# ---- grad mode, moved memory ----


def test_leaf_that_requires_grad(refused, good):
    p = torch.nn.Parameter(torch.zeros(8))
    refused(RuntimeError, f"'{BAD}'.*requires grad.*no_grad", lambda: add_noise_(p, 1, 1.0, name=BAD), p)
    refused(RuntimeError, f"'{BAD}'.*requires grad", lambda: add_noise_({GOOD: good, BAD: p}, 1, 1.0), good, p)
    refused(
        RuntimeError, f"'{BAD}'.*requires grad", lambda: add_noise_(ParamTable({GOOD: good, BAD: p}), 1, 1.0), good, p
    )
    # A view of one
    refused(RuntimeError, f"'{BAD}'.*requires grad", lambda: add_noise_({GOOD: good, BAD: p[2:]}, 1, 1.0), good, p)
    add_noise_({GOOD: torch.zeros(8)}, 1, 1.0, {GOOD: p})  # reading it is fine
    with torch.no_grad():
        add_noise_(p, 1, 1.0, name=BAD)
    assert p.any()


def test_moved_table(refused, good):
    p = torch.zeros(8)
    table = ParamTable({GOOD: good, BAD: p})
    p.data = torch.zeros(8)
    refused(RuntimeError, f"'{BAD}' moved.*refresh", lambda: add_noise_(table, 1, 1.0), good, p)
    refused(RuntimeError, f"'{BAD}' moved.*refresh", lambda: fingerprint(table), good, p)


# ---- backends ----


def test_backend_that_does_not_exist(refused, good, monkeypatch):
    def call():
        with es_kernels.backend("cudnn"):
            add_noise_(good, 1, 1.0, name=GOOD)

    refused(ValueError, "no backend 'cudnn'; there are cuda, triton, cpu, reference", call, good)
    monkeypatch.setenv("ES_KERNELS_BACKEND", "cudnn")
    refused(ValueError, "ES_KERNELS_BACKEND.*no backend 'cudnn'", lambda: add_noise_(good, 1, 1.0, name=GOOD), good)


def test_backend_that_is_not_there_says_why(refused, good, monkeypatch):
    with es_kernels.backend("cuda"):
        refused(
            RuntimeError,
            "cuda backend was asked for, but .*CUDA tensors, not cpu",
            lambda: add_noise_(good, 1, 1.0, name=GOOD),
            good,
        )
    monkeypatch.setenv("ES_KERNELS_BACKEND", "cuda")
    refused(RuntimeError, "cuda backend was asked for, but", lambda: fingerprint({GOOD: good}), good)
    with pytest.raises(RuntimeError, match="cuda backend was asked for"):
        es_kernels.active_backend()


def test_missing_library_says_how_to_get_it_and_the_next_backend_serves(good, monkeypatch):
    with es_kernels.backend("reference"):
        expected = add_noise_(good.clone(), 1, 1.0, name=GOOD)
    monkeypatch.setattr(native, "_load", lambda name: (None, f"libes_{name}.so was not built"))
    backends._warn.cache_clear()
    with pytest.warns(
        UserWarning, match="SLOW.*the reference backend serves cpu tensors, for cpu: libes_cpu.so was not built"
    ):
        assert es_kernels.active_backend() == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        assert torch.equal(add_noise_(good.clone(), 1, 1.0, name=GOOD), expected)
    with (
        es_kernels.backend("cpu"),
        pytest.raises(RuntimeError, match="cpu backend was asked for, but libes_cpu.so was not built"),
    ):
        add_noise_(good, 1, 1.0, name=GOOD)


def test_library_that_does_not_load_or_has_another_abi(tmp_path, monkeypatch):
    (tmp_path / "libes_cpu.so").write_bytes(b"not an ELF file")
    monkeypatch.setattr(native, "path", lambda name: tmp_path / f"libes_{name}.so")
    uncached = native._load.__wrapped__
    assert (
        "does not load" in uncached("cpu")[1]
        and "was not built" in uncached("cuda")[1]
        and "nvcc" in uncached("cuda")[1]
    )
    assert str(tmp_path) not in uncached("cpu")[1]
    monkeypatch.undo()
    if native.why_not("cpu") is None:
        monkeypatch.setattr(native, "ABI", native.ABI + 1)
        library, why = uncached("cpu")
        assert library is None and "ABI" in why and "reinstall" in why


def test_gpu_library_that_does_not_load_is_said_once_and_one_that_is_not_there_is_not(tmp_path, monkeypatch):
    """Triton serves in both cases."""
    reasons = {"cuda": "libes_cuda.so does not load: GLIBC_2.34 not found", "triton": None}
    monkeypatch.setattr(backends, "unavailable", lambda name, device: reasons[name])
    monkeypatch.setattr(native, "path", lambda name: tmp_path / f"libes_{name}.so")
    monkeypatch.setattr(native, "_load", lambda name: (None, reasons[name]))
    backends._warn.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert es_kernels.active_backend("cuda") == "triton"
    (tmp_path / "libes_cuda.so").write_bytes(b"not an ELF file")
    backends._warn.cache_clear()
    with pytest.warns(
        UserWarning, match="the triton backend serves cuda tensors, for cuda: libes_cuda.so does not load: GLIBC"
    ) as seen:
        for _ in range(2):
            assert es_kernels.active_backend("cuda") == "triton"
    assert len(seen) == 1


def test_triton_that_is_too_old_says_which_torch_brings_a_newer_one(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", "3.3.1")
    assert "triton 3.3.1 is too old: 3.6, which torch 2.10 brings" in backends.unavailable(
        "triton", torch.device("cuda")
    )


def test_override_nests_ends_and_is_of_one_thread(monkeypatch):
    import threading

    monkeypatch.setenv("ES_KERNELS_BACKEND", "reference")
    with es_kernels.backend("cpu"):
        with es_kernels.backend("reference"):
            assert es_kernels.active_backend() == "reference"
        assert es_kernels.active_backend() == "cpu"
        seen = []
        thread = threading.Thread(target=lambda: seen.append(es_kernels.active_backend()))
        thread.start(), thread.join()
        assert seen == ["reference"]
        with pytest.raises(ZeroDivisionError), es_kernels.backend("reference"):
            raise ZeroDivisionError
        assert es_kernels.active_backend() == "cpu"
    assert es_kernels.active_backend() == "reference"


def test_unknown_instruction_set(refused, good, monkeypatch):
    monkeypatch.setenv("ES_KERNELS_ISA", "sse9")
    with es_kernels.backend("cpu"):
        refused(
            RuntimeError,
            "no instruction set named sse9; it has .*(baseline|neon)",
            lambda: add_noise_(good, 1, 1.0, name=GOOD),
            good,
        )
        refused(RuntimeError, "no instruction set named sse9", lambda: fingerprint({GOOD: good}), good)


# ---- the C ABI refuses what the table never makes ----


@pytest.mark.parametrize(
    "field, value, words",
    (
        ("out_dtype", 3, "dtype"),
        ("base_dtype", -1, "dtype"),
        ("rows", 0, "rows"),
        ("cols", -1, "rows"),
        ("unit_end", 1, "units"),
        ("rows", 2**63 - 1, "units"),
        ("cols", 2**63 - 1, "units"),
        ("cols", 65, "units"),  # nine blocks, where eight are counted
        ("cols", 49, "units"),  # seven
        ("first", 1, "units"),
        ("out", 0, "null"),
        ("base", 0, "null"),
    ),
)
def test_abi_checks_segments(good, bits, field, value, words):
    if cpu_backend.unavailable(good.device):
        pytest.skip(cpu_backend.unavailable(good.device))
    before = bits(good)
    pack = es_kernels.layout.Pack(
        ParamTable({GOOD: good, "other": torch.zeros(64)}).layout, [good, torch.zeros(64)], [], []
    )
    pack.segments[field][-1] = value
    with pytest.raises(RuntimeError, match=f"segment {len(pack.segments) - 1}: .*{words}"):
        cpu_backend.add_noise_(pack, torch.ones(1, dtype=torch.int64), torch.ones(1), None, 0.0, 0)
    with pytest.raises(RuntimeError, match=words):
        cpu_backend.fingerprint(pack)
    assert torch.equal(bits(good), before)


def test_abi_wants_an_array_and_a_place_for_the_result(good, bits):
    if cpu_backend.unavailable(good.device):
        pytest.skip(cpu_backend.unavailable(good.device))
    library, before, one = cpu_backend._library(), bits(good), torch.ones(1, dtype=torch.int64).data_ptr()
    segments = es_kernels.layout.Pack(ParamTable({GOOD: good}).layout, [good], [], []).segments.ctypes.data
    for array, count in ((segments, -1), (segments, -(2**63)), (None, 1)):
        assert library.es_cpu_add_noise(array, count, one, one, 1, 0.0, None, 0, 1, None) == 1
        assert library.es_cpu_error() == b"segments are missing"
        assert library.es_cpu_fingerprint(array, count, one, 1, None) == 1
        assert library.es_cpu_error() == b"segments are missing"
        assert library.es_cpu_factors(array, count, one, 1, good.data_ptr(), 0, 1, None) == 1
        assert library.es_cpu_error() == b"factors are missing"
    assert library.es_cpu_fingerprint(segments, 1, None, 1, None) == 1
    assert library.es_cpu_error() == b"the result has no address"
    assert torch.equal(bits(good), before)


@pytest.mark.parametrize(
    "fields, noise_rank, words",
    (
        ({}, 0, "a width is for noise of low rank"),
        ({}, -1, "noise_rank is 0 to 64"),
        ({}, 65, "noise_rank is 0 to 64"),
        ({"width": -1}, 1, "a width is for"),
        ({"width": 299}, 1, "width do not fit"),  # fewer columns than the segment has
        ({"first": 1}, 1, "width do not fit"),
        ({"index_stride": 301}, 1, "width do not fit"),
        ({"units_per_row": 2048, "unit_end": 4096}, 1, "width do not fit"),
        ({"rows": 300}, 1, "units do not fit"),
    ),
)
def test_abi_checks_widths(bits, fields, noise_rank, words):
    matrix = torch.ones(130, 300)
    if cpu_backend.unavailable(matrix.device):
        pytest.skip(cpu_backend.unavailable(matrix.device))
    before = bits(matrix)
    pack = es_kernels.layout.Pack(ParamTable({GOOD: matrix}).layout, [matrix], [], [], matrices=True)
    for field, value in fields.items():
        pack.segments[field] = value
    with pytest.raises(RuntimeError, match=words):
        cpu_backend.add_noise_(pack, torch.ones(1, dtype=torch.int64), torch.ones(1), None, 0.0, noise_rank)
    with pytest.raises(RuntimeError, match="width"):
        cpu_backend.fingerprint(pack)
    assert torch.equal(bits(matrix), before)


def test_abi_wants_matrices_first(bits):
    matrix, vector = torch.ones(2, 8), torch.ones(16 * 2048)  # whose units are those of tiles
    if cpu_backend.unavailable(matrix.device):
        pytest.skip(cpu_backend.unavailable(matrix.device))
    pack = es_kernels.layout.Pack(ParamTable({"m": matrix, "v": vector}).layout, [matrix, vector], [], [], True)
    pack.segments = pack.segments[::-1].copy()
    pack.segments["unit_end"] = np.cumsum(np.diff(pack.segments["unit_end"][::-1], prepend=0)[::-1])
    with pytest.raises(RuntimeError, match="a width after a segment without one"):
        cpu_backend.add_noise_(pack, torch.ones(1, dtype=torch.int64), torch.ones(1), None, 0.0, 1)


@pytest.mark.parametrize(
    "field, value, words",
    (
        ("offset", 4, "offset"),
        ("count", -1, "count"),
        ("unit_end", 3, "units"),
        ("unit_end", -(2**63), "units"),
        ("domain", 0, "domain"),
    ),
)
def test_abi_checks_factors(field, value, words):
    out = torch.zeros(64)
    if cpu_backend.unavailable(out.device):
        pytest.skip(cpu_backend.unavailable(out.device))
    layout = es_kernels.low_rank.FactorLayout(0, (("m", 8, 8),), 1)
    layout.table[field][-1] = value
    with pytest.raises(RuntimeError, match=f"factor 1: .*{words}"):
        cpu_backend.factors(layout, out, torch.ones(1, dtype=torch.int64))
    assert not out.any()


# ---- a machine that has no more to give ----


def test_abi_without_memory_for_the_keys(bits, good):
    if cpu_backend.unavailable(good.device):
        pytest.skip(cpu_backend.unavailable(good.device))
    before, library = bits(good), cpu_backend._library()
    segments = es_kernels.layout.Pack(ParamTable({GOOD: good}).layout, [good], [], []).segments
    one, n_seeds = torch.ones(1, dtype=torch.int64).data_ptr(), 1 << 60
    assert library.es_cpu_add_noise(segments.ctypes.data, 1, one, one, n_seeds, 0.0, None, 0, 1, None) == 1
    assert library.es_cpu_error() == b"out of memory"
    assert torch.equal(bits(good), before)


def test_abi_without_address_space_for_threads(threads, bits):
    """The threads that could be started do all the work: 64 stacks of 8 MB are asked for where 60 MB are left."""
    weights, seeds = torch.zeros(1 << 18), torch.arange(64)
    if cpu_backend.unavailable(weights.device):
        pytest.skip(cpu_backend.unavailable(weights.device))
    pack = es_kernels.layout.Pack(ParamTable({GOOD: weights}).layout, [weights], [], [])

    def update():
        weights.zero_()
        with threads(64):
            cpu_backend.add_noise_(pack, seeds, torch.ones(64), None, 0.0, 0)
        return bits(weights)

    expected, limits = update(), resource.getrlimit(resource.RLIMIT_AS)
    size = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (60 << 20), limits[1]))
    try:
        actual = update()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert torch.equal(actual, expected)
