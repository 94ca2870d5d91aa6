"""Contract: what a call hands to a GPU is there when a kernel reads it and stays there until it has, on whichever
stream; nothing waits for the queue; what a captured CUDA graph could not replay is refused. On a CUDA that pretends:
which calls are made. Results: tests/gpu/test_bits.py."""

import contextlib
import types

import pytest
import torch

from es_kernels import ParamTable, streams
from es_kernels.backends import cuda, triton

GPU = torch.device("cuda", 1)


@pytest.fixture
def gpu(monkeypatch):
    """Two GPUs, of which 0 is current: `capturing`, a set of GPUs; `stream`, the current one of GPU 1; `current`, what
    torch.cuda.device made so."""
    state = types.SimpleNamespace(current=0, capturing=set(), stream=types.SimpleNamespace(cuda_stream=7))

    @contextlib.contextmanager
    def device(wanted):
        previous, state.current = state.current, torch.device(wanted).index
        yield
        state.current = previous

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.current in state.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: state.stream)
    return state


class Tensor:
    """As much of a tensor as is staged; writes down what is done to it."""

    is_cuda = False

    def __init__(self, device="cpu", n=3):
        self.device, self.n, self.done = torch.device(device), n, []

    def numel(self):
        return self.n

    def contiguous(self):
        return self

    def pin_memory(self):
        self.done.append("pin")
        return self

    def to(self, device, non_blocking=False):
        self.done.append(("to", device, non_blocking))
        return self

    def copy(self):
        return self

    def record_stream(self, stream):
        self.done.append(("read by", stream.cuda_stream))

    def data_ptr(self):
        return 0


@pytest.fixture
def pack(gpu, monkeypatch):
    """A pack as if of GPU 1, whose upload `pack.uploaded` notes."""
    tensor = torch.zeros(100)
    found = ParamTable({"w": tensor}).layout.pack([tensor])
    found.device, found.uploaded = GPU, Tensor()
    monkeypatch.setattr(torch, "from_numpy", lambda words: found.uploaded)
    yield found
    found.layout.pinned.clear()
    found.layout._packs.clear()


def other_stream(handle):
    return types.SimpleNamespace(cuda_stream=handle)


def test_every_stream_that_reads_a_table_is_recorded_once(gpu, pack):
    """When a table falls out of the cache the allocator gives its memory away: not before the streams are through that
    read it."""
    assert pack.on_device() is pack.on_device() is pack.uploaded
    assert pack.uploaded.done == [("to", GPU, False)], "a copy that waits: other streams may read at once"
    for handle in (9, 9, 7, 11, 9):
        gpu.stream = other_stream(handle)
        assert pack.on_device() is pack.uploaded
    assert pack.uploaded.done[1:] == [("read by", 9), ("read by", 11)]


def test_capturing_is_asked_of_the_packs_device(gpu, pack):
    gpu.capturing = {0}
    pack.on_device()
    assert pack.layout.pinned == []
    gpu.capturing = {1}
    pack.on_device()
    assert pack.layout.pinned == [pack] and gpu.current == 0
    pack._on_device = None
    with pytest.raises(RuntimeError, match="make one call with these tensors before capturing"):
        pack.on_device()


def test_seeds_are_staged_without_waiting(gpu):
    there, here, empty = Tensor(GPU), Tensor(), Tensor(n=0)
    streams.staged(GPU, there, here, empty)
    assert here.done == ["pin", ("to", GPU, True)] and there.done == empty.done == [("to", GPU, True)]


def test_python_seeds_are_refused_while_a_graph_is_captured(gpu):
    gpu.capturing = {1}
    with pytest.raises(RuntimeError, match="captured, pass seeds, coefs and rounding_seed as tensors on cuda:1"):
        streams.staged(GPU, Tensor())
    streams.staged(GPU, Tensor(GPU), Tensor(n=0))
    gpu.capturing = {0}
    streams.staged(GPU, Tensor())


@pytest.mark.skipif(triton.triton is None, reason="triton is not installed")
def test_both_backends_stage_what_is_not_on_the_device(gpu, pack, monkeypatch):
    gpu.capturing = {1}
    pack._on_device, pack._readers = pack.uploaded, {7}
    many = torch.zeros(cuda._HOST_SEEDS + 1, dtype=torch.int64)
    monkeypatch.setattr(cuda, "_library", lambda: pytest.fail("nothing is to be launched"))
    for backend, n in ((triton, 1), (cuda, len(many))):
        with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
            backend.add_noise_(pack, many[:n], many[:n].float(), None, 0.0, 0)


def test_the_cuda_library_is_called_with_the_packs_device_current(gpu, pack, monkeypatch):
    """By torch's guard, which goes back without making a context on a GPU that has none."""
    seen = []

    def call(*arguments):
        seen.append((gpu.current, arguments[-2]))
        return 0

    monkeypatch.setattr(
        cuda,
        "_library",
        lambda: types.SimpleNamespace(es_cuda_add_noise=call, es_cuda_fingerprint=call, es_cuda_error=None),
    )
    monkeypatch.setattr(torch, "zeros", lambda *size, **options: Tensor())
    cuda.add_noise_(pack, Tensor(), Tensor(), None, 0.0, 0)
    cuda.fingerprint(pack)
    assert seen == [(1, 1), (1, 1)] and gpu.current == 0
