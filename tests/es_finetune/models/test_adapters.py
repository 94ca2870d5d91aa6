"""Contract under test: a new LoRA adapter is all that is tuned and has the same first values everywhere; saved, loaded
and merged it computes what it did, or is refused (es_finetune.models.adapters)."""

import math
import re
import sys

import pytest
import safetensors.torch as safetensors
import torch
import transformers

import es_kernels
from es_finetune.errors import UserError
from es_finetune.models.checkpoint_names import named_segments
from es_finetune.models.load import EMBEDDED_MODEL, load_model
from es_finetune.models.save import save_model

TINY_LLAMA4 = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "intermediate_size_mlp": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 8,
}
TINY_LLAMA4 |= {
    "num_key_value_heads": 1,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "moe_layers": [1],
    "max_position_embeddings": 64,
}


def test_a_new_adapter_is_all_that_is_trainable(save_tiny, tmp_path, text):
    folder = save_tiny(tmp_path)
    base, tokenizer, _ = load_model(folder, device="cpu")
    model, _, identity = load_model(folder, device="cpu", lora_rank=3)
    trained = {name: p for name, p, _ in named_segments(model) if p.requires_grad}
    assert len(trained) == 2 * 7 * 2 and all(re.search(r"\.lora_[AB]\.weight$", name) for name in trained)
    assert identity["lora_rank"] == 3 and identity["class"] == "LlamaForCausalLM" and not model.training
    assert identity["trainable"] == sum(p.numel() for p in trained.values()) < identity["parameters"]
    assert text(model, tokenizer) == text(base, tokenizer)  # B is 0
    assert model.peft_config["default"].lora_alpha == 6


def test_a_router_that_returns_a_tuple_is_left_out_of_an_adapter(tmp_path, text):
    """Llama 4's is a linear layer to PEFT; wrapped, every forward pass would fail."""
    config = transformers.Llama4TextConfig(
        **{**TINY_LLAMA4, "vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    )
    transformers.Llama4ForCausalLM(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(EMBEDDED_MODEL).save_pretrained(tmp_path)
    model, tokenizer, _ = load_model(tmp_path, device="cpu", lora_rank=2)
    assert len(text(model, tokenizer)) == 2
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("shared_expert" in name for name in trained) and not any("router" in name for name in trained)


def test_the_first_values_of_an_adapter(save_tiny, bits, tmp_path):
    """They are the kernels' noise for seed 0, of variance 1 / (3 * inputs), whatever torch's generator holds, which
    stays as it was."""
    folder = save_tiny(tmp_path)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    model = load_model(folder, device="cpu", lora_rank=8)[0]
    assert torch.equal(torch.get_rng_state(), state)
    for name, p, _ in named_segments(model):
        if name.endswith("lora_A.weight"):
            expected = es_kernels.add_noise_(torch.zeros(p.shape), [0], [1 / math.sqrt(3 * p.shape[1])], name=name)
            assert torch.equal(bits(p), bits(expected)) and p.abs().sum() > 0
        elif name.endswith("lora_B.weight"):
            assert not p.any()
    prefix = "base_model.model.model.layers.0.self_attn."
    a = {name: p for name, p, _ in named_segments(model)}
    assert not torch.equal(a[f"{prefix}q_proj.lora_A.weight"], a[f"{prefix}k_proj.lora_A.weight"])


def test_an_adapter_saved_and_loaded_again(tuned, tmp_path, text, fingerprint):
    model, tokenizer = tuned
    save_model(model, tokenizer, tmp_path / "adapter")
    assert fingerprint(model, trainable=True) == es_kernels.fingerprint(
        safetensors.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    )
    again, its_tokenizer, identity = load_model(tmp_path / "adapter", device="cpu", dtype="bfloat16")
    assert fingerprint(again, trainable=True) == fingerprint(model, trainable=True) and fingerprint(
        again
    ) == fingerprint(model)
    assert text(again, its_tokenizer) == text(model, tokenizer)
    assert identity["base_model"] == str(tmp_path / "base") and identity["trainable"] == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


def test_an_adapter_without_tokenizer_uses_that_of_its_base(tuned, tmp_path):
    model, tokenizer = tuned
    model.save_pretrained(tmp_path / "adapter")
    assert load_model(tmp_path / "adapter", device="cpu")[1].get_vocab() == tokenizer.get_vocab()


def test_merged_it_is_a_full_model_and_the_one_in_memory_stays(tuned, tmp_path, fingerprint):
    model, tokenizer = tuned
    before = fingerprint(model)
    save_model(model, tokenizer, tmp_path / "merged", merge_lora=True)
    assert fingerprint(model) == before and any("lora_A" in name for name, _ in model.named_parameters())
    base = load_model(tmp_path / "base", device="cpu", dtype="bfloat16")[0]
    merged, _, identity = load_model(tmp_path / "merged", device="cpu")
    assert identity["dtype"] == "bfloat16" and "base_model" not in identity
    assert [n for n, _ in merged.named_parameters()] == [n for n, _ in base.named_parameters()]
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        logits = {name: m(ids).logits.float() for name, m in {"adapter": model, "merged": merged, "base": base}.items()}
    assert (logits["adapter"] - logits["merged"]).abs().max() < 0.1 * (logits["adapter"] - logits["base"]).abs().max()


def test_a_merged_mixture_keeps_its_checkpoint_names(save_tiny, tmp_path, fingerprint):
    folder = save_tiny(tmp_path / "base", "mixtral")
    model, tokenizer, _ = load_model(folder, device="cpu", lora_rank=2)
    save_model(model, tokenizer, tmp_path / "merged", merge_lora=True)
    merged = load_model(tmp_path / "merged", device="cpu")[0]
    assert fingerprint(merged) == fingerprint(load_model(folder, device="cpu")[0])  # B is 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind, wrong",
    [("llama", False), ("qwen2", False), ("mixtral", False), ("gemma", False), ("zamba", True), ("jamba", True)],
)
def test_a_merge_that_would_compute_otherwise_is_refused(build_model, tmp_path, kind, wrong, dtype, fingerprint):
    import peft

    tokenizer = transformers.AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    options = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(build_model(kind).to(dtype), options).eval()
    before = fingerprint(model)
    if wrong:
        said = f"adapter into the weights of {kind.title()}ForCausalLM: logits would be off by .* merge_lora"
        with pytest.raises(UserError, match=said):
            save_model(model, tokenizer, tmp_path / "merged", merge_lora=True)
        save_model(model, tokenizer, tmp_path / "adapter")
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    else:
        save_model(model, tokenizer, tmp_path / "merged", merge_lora=True)
        assert load_model(tmp_path / "merged", device="cpu")
    assert fingerprint(model) == before


def test_an_adapter_that_peft_cannot_merge_is_refused_in_one_line(tuned, tmp_path, monkeypatch):
    """As PEFT's layers over GPTQ's, each kind with an error of its own type."""
    import peft

    def merge(*args, **kwargs):
        raise NotImplementedError("this layer does not merge\nor so")

    monkeypatch.setattr(peft.tuners.lora.Linear, "merge", merge)
    with pytest.raises(UserError, match=r"LlamaForCausalLM: this layer does not merge; write the adapter") as raised:
        save_model(*tuned, tmp_path / "merged", merge_lora=True)
    assert "\n" not in str(raised.value) and not (tmp_path / "merged").exists()


def test_refuses_adapters_it_cannot_make(tuned, tmp_path, monkeypatch, refused, edit):
    model, tokenizer = tuned
    save_model(model, tokenizer, tmp_path / "adapter")
    refused("is an adapter already", tmp_path / "adapter", lora_rank=2)
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    refused("base model .*gone of adapter .*adapter could not be loaded", tmp_path / "adapter")
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=None)
    refused("does not say of which model", tmp_path / "adapter")
    monkeypatch.setitem(sys.modules, "peft", None)
    refused(r"pip install 'es-kernels\[lora\]'", tmp_path / "adapter")
    refused(r"pip install 'es-kernels\[lora\]'", tmp_path / "base", lora_rank=2)
