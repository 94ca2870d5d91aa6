import os
import pathlib

import pytest

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB


@pytest.fixture(scope="session", autouse=True)
def _vllm():
    import vllm  # noqa: F401 - `make test-vllm` has it; nothing is skipped where it is missing


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """saved(kind) -> folder of a random model of a few 100,000 parameters with the embedded model's tokenizer. Heads of
    32: vLLM's attention on CPUs refuses smaller ones. A vocabulary that is no multiple of 64, as vLLM pads it."""

    def save(kind, dtype="float32", **config):
        import torch
        import transformers

        from es_finetune.models.load import EMBEDDED_MODEL

        tokenizer = transformers.AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
        options = {
            "vocab_size": 40,
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        options |= {
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "head_dim": 32,
            "tie_word_embeddings": kind == "Qwen2",
        }
        options |= {
            f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")
        } | config
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**options))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0 if parameter.ndim > 1 else 1, 0.2)
        folder = tmp_path_factory.mktemp(kind)
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return pathlib.Path(folder)

    return save
