"""What one call costs whoever makes it, from Python and until its result is there: dispatch, checks, launch and work.

    python -m pytest bench/speed/bench_calls.py --benchmark-json FILE

test_host takes the CPU time of the calling thread instead, which a busy machine changes less: what the call costs where
nobody waits for the kernel.

By pytest-benchmark, whose JSON (and `pytest-benchmark compare`) keep the figures over time. How fast a kernel is beside
a copy and beside others is kernels.py's question: there variants are interleaved, and a GPU's time is taken without the
call's.
"""

import math
import statistics
import time

import pytest
import torch

import es_kernels
from bench.common import shapes
from bench.common.operations import DTYPES, operations, right
from es_kernels import ParamTable, add_noise_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["cuda", "triton"] if DEVICE == "cuda" else ["cpu"]
CASES = [(o, n) for n in (1 << 16, 1 << 24) for dtype in DTYPES for o in operations(dtype)]
CASES += [(o, 1 << 30) for o in operations("bf16") if o.seeds <= 1 and not o.stochastic]


def waiting(call):
    """The call, and on a GPU the wait for its end: the time to enqueue it alone would say nothing."""

    def run():
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run


@pytest.fixture(scope="module")
def copy_bandwidth():
    """bytes / s of a copy of a tensor of so many bytes, the floor, timed in the same way once a size."""
    known = {}

    def bandwidth(size):
        if size not in known:
            a, b = (torch.ones(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
            run, seconds = waiting(lambda: a.copy_(b)), []
            for _ in range(9):
                start = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - start)
            known[size] = 2 * size / statistics.median(seconds)
        return known[size]

    return bandwidth


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation, elements", CASES, ids=[f"{o.label}, {n}" for o, n in CASES])
def test_call(benchmark, copy_bandwidth, operation, elements, backend):
    """One tensor in a ParamTable."""
    benchmark.group = f"{elements} {operation.out}"
    out = torch.empty(elements, dtype=DTYPES[operation.out], device=DEVICE).normal_(0, 0.02)
    master = ParamTable({"w": torch.empty(elements, device=DEVICE).normal_(0, 0.02)}) if operation.base else None
    moved = operation.bytes_per_value * elements
    floor = copy_bandwidth(out.nbytes)
    with es_kernels.backend(backend):
        assert right(operation, DEVICE, backend), "wrong bits: not measured"
        run = waiting(operation.on(ParamTable({"w": out}), master, DEVICE))
        benchmark.pedantic(
            run, warmup_rounds=1, rounds=max(3, min(30, round(1e9 / (elements * max(1, operation.seeds)))))
        )
    median = benchmark.stats.stats.median
    benchmark.extra_info |= {
        "backend": backend,
        "operation": operation.label,
        "elements": elements,
        "bytes": moved,
        "threads": torch.get_num_threads(),
    }
    benchmark.extra_info |= {"gb_per_s": moved / median / 1e9, "share_of_copy": moved / median / floor}
    if operation.what not in ("fingerprint", "restore"):
        benchmark.extra_info["normals_per_s"] = operation.seeds * elements / median


def _bare(tensors):
    (name, tensor), *_ = tensors.items()
    return lambda: add_noise_(tensor, 1, 1e-3, name=name)


def _table(tensors):
    table = ParamTable(tensors)
    return lambda: add_noise_(table, 1, 1e-3)


FORMS = {
    "a bare tensor": _bare,
    "a ParamTable of 290 tensors": _table,
    "a dict of 290 tensors": lambda tensors: lambda: add_noise_(tensors, 1, 1e-3),
    "290 bare tensors": lambda tensors: (
        lambda: [add_noise_(tensor, 1, 1e-3, name=name) for name, tensor in tensors.items()]
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_form(benchmark, form, backend):
    """The price of the call itself: tensors of 8 elements, as many as Qwen2.5-0.5B has."""
    benchmark.group = "forms"
    names = list(shapes.parameter_shapes("Qwen2.5-0.5B"))
    assert len(names) == 290
    tensors = {name: torch.zeros(8, device=DEVICE) for name in names}
    with es_kernels.backend(backend):
        benchmark.pedantic(waiting(FORMS[form](tensors)), warmup_rounds=3, rounds=30, iterations=3)
    assert all(math.isfinite(t.sum()) for t in tensors.values())
    benchmark.extra_info |= {"backend": backend, "form": form}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("base", (False, True), ids=("in place", "from a base"))
@pytest.mark.parametrize("tensors", (300, 2000))
def test_host(benchmark, monkeypatch, tensors, base, backend):
    """A call on ParamTables of so many tensors of 8 elements, in microseconds of its thread: with the launch (on a CPU
    the kernel), and before it."""
    benchmark.group = "host"
    live = {f"layers.{i}.weight": torch.zeros(8, dtype=torch.bfloat16, device=DEVICE) for i in range(tensors)}
    table, master = ParamTable(live), ParamTable({name: t.float() for name, t in live.items()}) if base else None
    call = lambda: add_noise_(table, 1, 1e-3, master)  # noqa: E731
    with es_kernels.backend(backend):
        benchmark.pedantic(waiting(call), warmup_rounds=3, rounds=30)
        with_kernel = thread_microseconds(call)
        monkeypatch.setattr(es_kernels.backends.choose(torch.device(DEVICE)), "add_noise_", lambda *arguments: None)
        before_it = thread_microseconds(call)
    benchmark.extra_info |= {
        "backend": backend,
        "tensors": tensors,
        "base": base,
        "thread_us": with_kernel,
        "thread_us_before_kernel": before_it,
    }


def thread_microseconds(call):
    """CPU time of this thread: the median of 300 calls."""
    times = []
    for _ in range(300):
        start = time.thread_time_ns()
        call()
        times.append((time.thread_time_ns() - start) / 1000)
        if DEVICE == "cuda":
            torch.cuda.synchronize()  # a full queue would block the next launch
    return statistics.median(times)
