"""Fixtures of tests/es_finetune: backends, small named weights, a small Llama, bit patterns."""

import pytest
import torch

import es_kernels

BACKENDS = ("cpu", "reference", "triton")
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Models of these sizes gain nothing from a second thread, and with a busy neighbour each small product waits for it."""
    torch.set_num_threads(1)


@pytest.fixture(params=BACKENDS)
def kernel_backend(request):
    """Each backend that serves CPU tensors here, active during the test; skipped, with its reason, where it cannot."""
    if request.param == "triton":
        request.getfixturevalue("exact_interpreter")
    try:
        with es_kernels.backend(request.param):
            es_kernels.add_noise_(torch.zeros(8), [1], [1.0], name="probe")
            chosen = es_kernels.backend(request.param)
    except (RuntimeError, ImportError, ValueError) as error:
        pytest.skip(f"backend {request.param}: {error}")
    with chosen:
        yield request.param


@pytest.fixture
def bits():
    """The tensor as integers of its width: == on them is equality to the bit, -0 and NaN included."""
    return lambda tensor: tensor.detach().clone().contiguous().view(_BITS[tensor.element_size()])


@pytest.fixture
def weights():
    """make(dtype, ...) -> list of (name, parameter): odd sizes, one dtype per tensor in turn, always the same values."""

    def make(*dtypes):
        generator = torch.Generator().manual_seed(0)
        shapes = [(7, 9), (33,), (16, 8), (1,)]
        return [
            (f"layer{i}.weight", torch.nn.Parameter((0.1 * torch.randn(shape, generator=generator)).to(dtypes[i % len(dtypes)])))
            for i, shape in enumerate(shapes)
        ]

    return make


@pytest.fixture
def tiny_llama():
    """A Llama of 9,000 parameters with tied embeddings and random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )
    ).eval()
