"""Fixtures of tests/es_finetune: backends, small named weights, a small Llama, bit patterns."""

import functools

import pytest
import torch
from matplotlib.figure import Figure

import es_kernels
from es_finetune.tasks import countdown_char

STATES = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4}
BACKENDS = ("cpu", "reference", "triton")
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Models of these sizes gain nothing from a second thread, and with a busy neighbour each small product waits for
    it."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def questions_made_once():
    """Each small run of the embedded model asks those of countdown-char, which take a tenth of its time to make."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(countdown_char, "solutions", functools.cache(countdown_char.solutions))
        yield


@pytest.fixture(autouse=True)
def reward_png_is_not_rendered(request, monkeypatch):
    """A run draws reward.png at its end; to render it too takes a fifth of the time of a small run. A test that looks
    at the picture asks for `rendered`."""
    savefig = Figure.savefig

    def save(self, out, format, **options):
        return out.write(b"not rendered") if format == "png" else savefig(self, out, format=format, **options)

    if "rendered" not in request.fixturenames:
        monkeypatch.setattr(Figure, "savefig", save)


@pytest.fixture
def rendered():
    """reward.png is rendered: see reward_png_is_not_rendered."""


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
    """make(dtype, ...) -> list of (name, parameter): odd sizes, one dtype per tensor in turn, always the same
    values."""

    def make(*dtypes):
        generator = torch.Generator().manual_seed(0)
        shapes = [(7, 9), (33,), (16, 8), (1,)]
        return [
            (
                f"layer{i}.weight",
                torch.nn.Parameter((0.1 * torch.randn(shape, generator=generator)).to(dtypes[i % len(dtypes)])),
            )
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


@pytest.fixture(scope="session")
def build_model():
    """build_model(kind, **config) -> a fresh model of some 10,000 parameters, the same at each call.

    Kinds: llama; gpt2 (Conv1D, embedded positions); qwen2 (tied embeddings, biases); qwen3 (norms of q and k);
    mixtral and qwen3_moe (experts fused in memory); gemma; gemma3 (scaled embeddings); mixed (gemma in bfloat16 with
    norms in float32); gemma3_vision (with a tower that sees); rwkv (which does not ignore padding); zamba and jamba
    (state spaces); lora (llama with a PEFT adapter on all linear layers, B not 0). Their vocabulary of 40 and special
    tokens fit the embedded model's tokenizer.
    """

    def build(kind, **config):
        import transformers

        if kind == "lora":
            import peft

            adapter = peft.LoraConfig(**{"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config})
            torch.manual_seed(1)
            model = peft.get_peft_model(build("llama"), adapter)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_(0, 0.1)
            return model.eval()
        if kind == "mixed":
            model = build("gemma", **config).bfloat16()
            for name, module in model.named_modules():
                if name.endswith("norm"):
                    module.float()
            return model
        if kind == "gemma3_vision":
            text = build("gemma3").config.to_dict()
            vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
            vision |= {"image_size": 28, "patch_size": 14}
            options = {
                "mm_tokens_per_image": 4,
                "image_token_index": 39,
                "boi_token_index": 37,
                "eoi_token_index": 38,
                "eos_token_id": 2,
                **config,
            }
            torch.manual_seed(0)
            return transformers.Gemma3ForConditionalGeneration(
                transformers.Gemma3Config(text_config=text, vision_config=vision, **options)
            ).eval()
        family, options = {
            "llama": ("Llama", {}),
            "gpt2": ("GPT2", {}),
            "qwen3": ("Qwen3", {"head_dim": 8}),
            "rwkv": ("Rwkv", {"attention_hidden_size": 16, "context_length": 64}),
            "zamba": (
                "Zamba",
                {"num_hidden_layers": 6, "attention_hidden_size": 32, "attention_head_dim": 16, **STATES},
            ),
            "jamba": (
                "Jamba",
                {"num_hidden_layers": 4, "num_experts": 2, "num_experts_per_tok": 1, "mamba_dt_rank": 2, **STATES},
            ),
            "gemma": ("Gemma", {"head_dim": 8}),
            "gemma3": ("Gemma3", {"head_dim": 8}),
            "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
            "mixtral": ("Mixtral", {"num_local_experts": 4}),
            "qwen3_moe": (
                "Qwen3Moe",
                {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8},
            ),
        }[kind]
        options = {
            "vocab_size": 40,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            **options,
        }
        options |= {"num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.2}
        options |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **config}
        torch.manual_seed(0)
        config = f"{family}TextConfig" if kind == "gemma3" else f"{family}Config"
        head = {"gpt2": "LMHeadModel"}.get(kind, "ForCausalLM")
        return getattr(transformers, f"{family}{head}")(getattr(transformers, config)(**options)).eval()

    return build


@pytest.fixture
def tiny_qwen2(build_model):
    return build_model("qwen2")


@pytest.fixture
def tiny_mixtral(build_model):
    return build_model("mixtral")


@pytest.fixture
def tiny_lora(build_model):
    return build_model("lora")


@pytest.fixture(scope="session")
def save_tiny(build_model):
    """save_tiny(folder, kind="llama", **config) -> folder, as a str: a model of `build_model` with the embedded model's
    tokenizer, for `--model`."""

    def save(folder, kind="llama", **config):
        from transformers import AutoTokenizer

        from es_finetune.models.load import EMBEDDED_MODEL

        build_model(kind, **config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(EMBEDDED_MODEL).save_pretrained(folder)
        return str(folder)

    return save
