"""Times variants of one piece of work against each other: interleaved, so that what the machine does meanwhile meets
all of them alike.

On a GPU what is measured is the GPU's time between two events, never the time that it takes to ask for the work. Work
runs in one of two ways:

    captured    As a CUDA graph over buffer sets that together exceed the L2 cache three times: for calls of a few
                microseconds, of which Python could not queue enough. Why not flush the cache instead: a flush would
                leave dirty lines for the timed kernel to evict.
    eager       For what cannot be captured (a generator's seed) or is long enough: whole models, which exceed the cache
                by themselves.

Before either a kernel spins (torch.cuda._sleep), twice as long as the host needed to ask for all of it the last time:
so the whole sample is in the queue when its first kernel begins. Whether it was, each sample says: the first event must
not have happened yet when the last request was made (`queued`). What waits for the GPU itself (es-at-scale empties the
allocator's cache) cannot be queued, nor all of what asks for more than a stream's queue holds: its gaps count, as they
do for whoever runs it.
"""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from bench.common.environment import Sensors

_LEAST_SECONDS = 1e-3  # of one sample: an event resolves 0.5 us
_CYCLES = 2e9  # a second, at the highest clock that there is; at a lower one the GPU spins longer
_HEAD_START = (50e-6, 0.1)  # seconds that it spins, at least and at most


class Variant(NamedTuple):
    run: Callable[[int], object]  # does the work once, on buffer set k
    copies: int = 1  # buffer sets to rotate over, k = 0 ... copies - 1
    capture: bool = True  # on CUDA: as a graph


class Timing(NamedTuple):
    """Of one run, in seconds; and the medians of the sensors' readings while it ran (None: not known). On a GPU:
    whether every sample was queued before it began; and of what ran eagerly the median of the host's seconds to ask for
    a run, or to wait for one that cannot be queued."""

    median: float
    p20: float
    p80: float
    rounds: int
    queued: bool | None = None
    host_seconds: float | None = None
    sm_mhz: float | None = None
    memory_mhz: float | None = None
    watts: float | None = None

    def row(self):
        """Of a result file: the median as `seconds`, and what else is known."""
        known = {key: value for key, value in self._asdict().items() if key != "median" and value is not None}
        return {"seconds": self.median, **known}


def buffers(bytes_a_set, device):
    """How many buffer sets exceed the L2 cache three times; 1 on a CPU, where the sizes that matter exceed it alone."""
    if torch.device(device).type != "cuda":
        return 1
    return -(-3 * torch.cuda.get_device_properties(device).L2_cache_size // bytes_a_set)


def interleave(variants, device, rounds=9):
    """{name: Variant} -> {name: Timing}. Each is warmed up, then all are sampled in turn, `rounds` times."""
    cuda = torch.device(device).type == "cuda"
    samplers = {name: (_on_gpu if cuda else _on_cpu)(variant, device) for name, variant in variants.items()}
    samples = {name: [] for name in variants}
    sensors = Sensors(device) if cuda else None
    for round_ in range(rounds + 1):
        for name, sample in samplers.items():
            timed = sample(sensors)
            if round_:  # the first warms up
                samples[name].append(timed)
    return {name: _timing(timed) for name, timed in samples.items()}


def _timing(samples):
    """Of samples with `seconds`, and whatever else was known of each."""
    others = {key: [sample[key] for sample in samples] for key in samples[0] if key != "seconds"}
    queued = all(others.pop("queued")) if "queued" in others else None
    return Timing(
        *percentiles([sample["seconds"] for sample in samples]),
        len(samples),
        queued,
        **{key: _median(each) for key, each in others.items()},
    )


def percentiles(samples):
    """(median, p20, p80); the latter two are samples."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)]


def _median(readings):
    known = [reading for reading in readings if reading is not None]
    return statistics.median(known) if known else None


def _on_cpu(variant, device):
    # torch.compile and lazy imports take seconds once.
    for k in range(variant.copies):
        variant.run(k)
    position = 0

    def sample(sensors):
        nonlocal position
        position = (position + 1) % variant.copies
        start = time.perf_counter()
        variant.run(position)
        return {"seconds": time.perf_counter() - start}

    return sample


def _on_gpu(variant, device):
    run_all = prepared(variant, device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def timed(repeats, head_start, sensors=None):
        """(seconds of the GPU, of the host, all of it queued before it began, readings)"""
        torch.cuda._sleep(int(head_start * _CYCLES))
        begin.record()
        start = time.perf_counter()
        for _ in range(repeats):
            run_all()
        host = time.perf_counter() - start
        end.record()
        queued = not begin.query()
        reading = sensors.now() if sensors else {}  # while it runs
        end.synchronize()
        return begin.elapsed_time(end) / 1000, host, queued, reading

    least, most = _HEAD_START
    timed(1, least)
    seconds, host, *_ = timed(1, least)
    repeats = max(1, round(_LEAST_SECONDS / max(seconds, 1e-6)))

    def sample(sensors):
        nonlocal host
        seconds, host_of_all, queued, reading = timed(repeats, min(max(least, 2 * repeats * host), most), sensors)
        if queued:  # else it waited for the GPU, or for a place in a full queue
            host = max(host, host_of_all / repeats)
        runs = repeats * variant.copies
        return {
            "seconds": seconds / runs,
            "queued": queued,
            "host_seconds": None if variant.capture else host_of_all / runs,
        } | reading

    return sample


def prepared(variant, device):
    """A function that does the work once on every buffer set of a GPU, as one graph if it can be captured."""

    def run_all():
        for k in range(variant.copies):
            variant.run(k)

    if not variant.capture:
        return run_all
    torch.cuda.synchronize(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        run_all()  # uploads parameter tables and compiles, neither of which can be captured
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run_all()
    return graph.replay


def joules(variant, device, seconds=0.4):
    """Energy of one run on a GPU, of the whole board, over so long a time that its counter (which moves every 100 ms)
    resolves it; None: not known."""
    sensors, run_all = Sensors(device), prepared(variant, device)
    torch.cuda.synchronize(device)
    before, start, runs = sensors.joules(), time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        run_all()
        torch.cuda.synchronize(device)
        runs += variant.copies
    after = sensors.joules()
    return None if before is None or after is None else (after - before) / runs


def peak_extra_bytes(run, device):
    """The most memory that run() holds beyond what is held before it: of the allocator on a GPU, of the process on a
    CPU (resident pages)."""
    run()  # what is kept for good (tables, compiled code) is no part of it
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # resets the peak
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def _status(field):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field))
