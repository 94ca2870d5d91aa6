"""A GPU that is played: a queue and two clocks for what is timed; for whole runs its memory is the CPU's, and the cpu
backend serves it."""

import contextlib
import types

import pytest
import torch
from torch.overrides import TorchFunctionMode

from bench.common import timing
from es_kernels import backends


class GPU:
    """Its clock and the host's, in seconds: work begins when it was asked for and what was asked for before it has
    ended."""

    def __init__(self):
        self.host = self.free = 0.0

    def launch(self, seconds, host_seconds=5e-6):
        self.host += host_seconds
        self.free = max(self.free, self.host) + seconds

    def synchronize(self, device=None):
        self.host = max(self.host, self.free)


@pytest.fixture
def gpu(monkeypatch):
    gpu = GPU()

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            gpu.launch(0, 1e-6)
            self.at = gpu.free

        def query(self):
            return gpu.host >= self.at

        def synchronize(self):
            gpu.host = max(gpu.host, self.at)

        def elapsed_time(self, end):
            return 1000 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: gpu.launch(cycles / timing._CYCLES), raising=False)
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: gpu.host))
    monkeypatch.setattr(timing, "Sensors", lambda device: types.SimpleNamespace(now=dict))
    return gpu


class _OnCPU(TorchFunctionMode):
    """Tensors asked for on "cuda" are made on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def on_cpu(argument):
            return (
                "cpu"
                if function is not torch.device
                and isinstance(argument, (str, torch.device))
                and str(argument).startswith("cuda")
                else argument
            )

        return function(*map(on_cpu, args), **{name: on_cpu(value) for name, value in (kwargs or {}).items()})


@pytest.fixture
def played_gpu(gpu, monkeypatch):
    """An H200 on which everything takes 10 us of GPU and 20 us of host; what is captured runs then, and not again."""
    properties = types.SimpleNamespace(
        name="NVIDIA H200",
        multi_processor_count=132,
        L2_cache_size=10_000,
        major=9,
        minor=0,
        total_memory=int(150e9),
        uuid="0",
    )

    @contextlib.contextmanager
    def graph(captured, stream):
        captured.replay = lambda: gpu.launch(10e-6, 20e-6)
        yield

    played = {
        "is_available": lambda: True,
        "get_device_properties": lambda device=None: properties,
        "mem_get_info": lambda device=None: (int(149e9), int(150e9)),
        "synchronize": gpu.synchronize,
        "Stream": lambda device: None,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": types.SimpleNamespace,
        "graph": graph,
        "empty_cache": lambda: None,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
    }
    for name, stands_for in played.items():
        monkeypatch.setattr(torch.cuda, name, stands_for)
    cpu = backends._module("cpu")

    def add_noise_(*arguments):
        gpu.launch(10e-6, 20e-6)
        cpu.add_noise_(*arguments)

    served = types.SimpleNamespace(
        unavailable=lambda device: None,
        add_noise_=add_noise_,
        fingerprint=cpu.fingerprint,
        __name__="es_kernels.backends.cuda",
    )
    monkeypatch.setattr(backends, "_module", lambda name: served)
    with _OnCPU():
        yield gpu
