"""Contract: theta in host memory is one block, as large as its tensors, each aligned to 64 bytes and with a storage of
its own; CUDA pins it once, for as long as a tensor of it lives."""

import contextlib
import copy
import ctypes
import gc
import itertools
import types

import pytest
import torch

from es_finetune import EvolutionStrategy
from es_finetune.optim import host_memory

F32 = torch.float32
# Qwen2.5-7B: two embeddings; of each layer q and o, k and v with biases, gate, up and down, two norms.
LAYER = [(3584, 3584)] * 2 + [(3584,), (512, 3584), (512,), (512, 3584), (512,)] + [(18944, 3584)] * 3 + [(3584,)] * 2
QWEN_7B = [(152064, 3584)] * 2 + LAYER * 28 + [(3584,)]


def asked(monkeypatch, tensors):
    """The bytes that the block of `tensors` takes, without taking them."""

    class Asked(Exception):
        pass

    def ask(_, nbytes, **options):
        raise Asked(nbytes)

    with monkeypatch.context() as patch:
        patch.setattr(host_memory.mmap, "mmap", ask)
        with pytest.raises(Asked) as raised:
            host_memory.empty_like(tensors, F32)
    return raised.value.args[0]


def test_the_block_is_as_large_as_its_tensors(monkeypatch):
    model = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in QWEN_7B]
    needed = 4 * sum(t.numel() for t in model)
    assert asked(monkeypatch, model) == needed and 30.4e9 < needed < 30.5e9
    assert sum(1 << (4 * t.numel() - 1).bit_length() for t in model) > 57.8e9, "what torch's pinned memory takes"
    odd = [torch.empty(n, device="meta") for n in (1, 16, 17, 0)]
    assert asked(monkeypatch, odd) == 64 + 64 + 128


def test_tensors_are_aligned_apart_and_have_the_strides_and_a_storage_of_their_own():
    like = [torch.empty(3, 5).t(), torch.empty(33, dtype=torch.bfloat16), torch.empty(0, 4), torch.empty(())]
    like.append(torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last))
    tensors = host_memory.empty_like(like, F32)
    for i, (t, of) in enumerate(zip(tensors, like, strict=True)):
        expected = torch.empty_like(of, dtype=F32)
        assert (t.dtype, t.shape, t.stride(), t.device) == (F32, of.shape, expected.stride(), torch.device("cpu"))
        assert t.data_ptr() % 64 == 0 and t.untyped_storage().nbytes() == 4 * t.numel() and not t._is_view()
        t.fill_(i)
    assert all((t == i).all() for i, t in enumerate(tensors))
    spans = sorted((t.data_ptr(), t.data_ptr() + 4 * t.numel()) for t in tensors if t.numel())
    assert (
        all(end <= start for (_, end), (start, _) in itertools.pairwise(spans)) and spans[-1][1] - spans[0][0] < 1000
    ), "one block"
    again = copy.deepcopy(tensors[1])
    tensors[1].zero_()
    assert (again == 1).all() and again.untyped_storage().nbytes() == 4 * 33


@pytest.fixture
def cudart(monkeypatch):
    """CUDA's runtime as far as it pins memory; what it was asked. `status`: what it answers."""
    made = types.SimpleNamespace(status=0, registered=[], unregistered=[], device=None)

    def register(address, nbytes, flags):
        made.registered.append((address, nbytes, flags, made.device))
        return made.status

    def unregister(address):
        made.unregistered.append((address, ctypes.string_at(address, 4)))  # still mapped
        return 0

    @contextlib.contextmanager
    def device(wanted):
        made.device = wanted
        yield
        made.device = None

    monkeypatch.setattr(
        torch.cuda, "cudart", lambda: types.SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    )
    monkeypatch.setattr(torch.cuda, "device", device)
    return made


def test_the_block_is_pinned_until_its_last_tensor_is_gone(cudart):
    gpu = torch.device("cuda", 1)
    first, second = host_memory.empty_like([torch.empty(10), torch.empty(100)], F32, gpu)
    assert cudart.registered == [(first.data_ptr(), 64 + 448, 3, gpu)]
    first.view(torch.int32).fill_(7)
    view = second[3:]
    del first, second
    gc.collect()
    assert cudart.unregistered == []
    del view
    gc.collect()
    assert cudart.unregistered == [(cudart.registered[0][0], b"\7\0\0\0")]


def test_memory_that_cannot_be_pinned_is_an_error_with_a_remedy(cudart):
    cudart.status = 2
    with pytest.raises(
        RuntimeError, match=r'cannot pin 0.1 GB of host memory for master="host" \(error 2\).*master="copy"'
    ):
        host_memory.empty_like([torch.empty(25_000_000, device="meta")], F32, torch.device("cuda"))
    gc.collect()
    assert cudart.unregistered == []


def test_the_optimizer_keeps_theta_there(monkeypatch):
    blocks = []
    make = host_memory.empty_like
    monkeypatch.setattr(
        host_memory,
        "empty_like",
        lambda tensors, dtype, gpu: blocks.append((len(tensors), dtype, gpu)) or make(tensors, dtype, gpu),
    )
    named = [(f"w{i}", torch.nn.Parameter(torch.full((30,), float(i), dtype=torch.bfloat16))) for i in range(3)]
    opt = EvolutionStrategy(named, master="host", population=2)
    assert blocks == [(3, F32, None)]
    saved = opt.state_dict()["es"]["theta"]
    assert all((saved[f"w{i}"] == i).all() and saved[f"w{i}"].untyped_storage().nbytes() == 120 for i in range(3))
