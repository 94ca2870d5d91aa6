"""Contract under test: load_model gives a model, its tokenizer and what identifies them, or a UserError of one line
(es_finetune.models.load)."""

import json

import pytest
import safetensors.torch as safetensors
import torch
import transformers

from es_finetune.errors import UserError
from es_finetune.models.load import empty_model, load_model
from es_finetune.models.save import save_model


def test_the_embedded_model():
    model, tokenizer, identity = load_model("embedded", device="cpu")
    assert not model.training and model.device.type == "cpu" and tokenizer.padding_side == "left"
    n = sum(p.numel() for p in model.parameters())
    assert identity == {
        "model": "embedded",
        "class": "LlamaForCausalLM",
        "commit": None,
        "dtype": "float32",
        "parameters": n,
        "trainable": n,
        "vocabulary": len(tokenizer),
    }
    assert json.loads(json.dumps(identity)) == identity


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_dtype(save_tiny, build_model, tmp_path, stored, dtype):
    save_tiny(tmp_path)
    build_model("llama").to(stored).save_pretrained(tmp_path)
    model, _, identity = load_model(tmp_path, device="cpu", dtype=dtype)
    expected = stored if dtype == "auto" else getattr(torch, dtype)
    assert {p.dtype for p in model.parameters()} == {expected} and identity["dtype"] == str(expected).removeprefix(
        "torch."
    )


def test_attn_implementation(save_tiny, tmp_path):
    assert (
        load_model(save_tiny(tmp_path), device="cpu", attn_implementation="eager")[0].config._attn_implementation
        == "eager"
    )


def test_refuses_what_is_not_there(tmp_path, refused):
    refused("the model.s folder .*nowhere does not exist", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("model .*empty could not be loaded", tmp_path / "empty")
    refused("dtype must be one of auto, float32, bfloat16, float16, not 'int8'", "embedded", dtype="int8")
    refused("lora_rank must be at least 0", "embedded", lora_rank=-1)
    refused("attn_implementation|nonsense", "embedded", attn_implementation="nonsense")
    refused("model embedded could not be loaded", "embedded", device="cuda:99")


def test_refuses_a_broken_checkpoint(save_tiny, build_model, tmp_path, refused):
    save_tiny(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").write_bytes(b"no safetensors at all")
    refused("model .*a could not be loaded", tmp_path / "a")
    save_tiny(tmp_path / "b")
    weights = build_model("llama").state_dict()
    del weights["model.layers.1.mlp.up_proj.weight"]
    safetensors.save_file(weights, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    refused(r"lacks 1 weight.*model\.layers\.1\.mlp\.up_proj\.weight", tmp_path / "b")
    save_tiny(tmp_path / "c")
    (tmp_path / "c" / "tokenizer.json").write_text("{")
    refused("tokenizer of .*c could not be loaded", tmp_path / "c")


def test_refuses_quantised_and_odd_weights(save_tiny, build_model, tmp_path, refused, edit):
    save_tiny(tmp_path / "a")
    edit(tmp_path / "a" / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    refused("quantised weights.*float32, bfloat16 and float16", tmp_path / "a")
    save_tiny(tmp_path / "b")
    build_model("llama").double().save_pretrained(tmp_path / "b")
    refused("embed_tokens.weight is torch.float64", tmp_path / "b")
    assert load_model(tmp_path / "b", device="cpu", dtype="float32")[0].dtype == torch.float32


def test_pad_token(save_tiny, tmp_path, refused, edit):
    folder = save_tiny(tmp_path)
    edit(tmp_path / "tokenizer_config.json", pad_token=None)
    edit(tmp_path / "tokenizer.json", padding=None)
    refused(r"no pad token.*--pad_token.*'\$'", folder)
    refused("pad_token 'two words' is no token", folder, pad_token="two words")
    model, tokenizer, _ = load_model(folder, device="cpu", pad_token="$")
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("$", tokenizer.eos_token_id)
    save_model(model, tokenizer, tmp_path / "saved")
    assert load_model(tmp_path / "saved", device="cpu")[1].pad_token == "$"


def test_refuses_a_pad_token_that_the_model_does_not_embed(save_tiny, tmp_path, refused, edit):
    folder = save_tiny(tmp_path, vocab_size=12, pad_token_id=0)
    edit(tmp_path / "tokenizer_config.json", pad_token="?")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    last = max(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    refused("the model embeds 12 tokens", folder, pad_token=last)


def test_an_empty_model_has_the_names_and_options_of_the_checkpoint(save_tiny, edit, tmp_path):
    folder = save_tiny(tmp_path)
    model, tokenizer, dtype = empty_model(folder)
    loaded = load_model(folder, device="cpu")[0]
    assert {p.device.type for p in model.parameters()} == {"meta"} and dtype == torch.float32
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in loaded.named_parameters()}
    assert model.generation_config.eos_token_id == loaded.generation_config.eos_token_id == 2
    edit(tmp_path / "generation_config.json", max_new_tokens=-1)
    with pytest.raises(UserError, match="^generation config of model .* could not be loaded: .*max_new_tokens"):
        empty_model(folder)
    (tmp_path / "generation_config.json").unlink()
    assert empty_model(folder)[0].generation_config is not None
