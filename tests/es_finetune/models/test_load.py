"""Contract under test: load_model gives a model, its tokenizer and what identifies them, or a ValueError of one line; a
new LoRA adapter has the same first values everywhere; what save_model writes, from_pretrained reads, with the same bits
and the same text, and the folder is at no time half of it."""

import functools
import json
import math
import re
import sys

import pytest
import safetensors.torch as safetensors
import torch
import transformers

import es_kernels
from es_finetune.models.checkpoint_names import named_segments
from es_finetune.models.load import EMBEDDED_MODEL, empty_model, load_model, save_model


def text(model, tokenizer):
    batch = tokenizer(["^1,2,3=6:", "^7=7:"], return_tensors="pt", padding=True, return_token_type_ids=False)
    return model.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id).tolist()


def fingerprint(model, trainable=False):
    return es_kernels.fingerprint(
        es_kernels.ParamTable(e for e in named_segments(model) if e[1].requires_grad or not trainable)
    )


def refused(match, *args, **kwargs):
    with pytest.raises(ValueError, match=match) as caught:
        load_model(*args, **{"device": "cpu", **kwargs})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def edit(path, **changes):
    path.write_text(json.dumps({k: v for k, v in {**json.loads(path.read_text()), **changes}.items() if v is not None}))


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


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mixtral", "qwen3_moe"])
def test_saved_and_loaded_again(save_tiny, tmp_path, kind):
    model, tokenizer, identity = load_model(save_tiny(tmp_path / "first", kind), device="cpu", dtype="bfloat16")
    with torch.no_grad():
        es_kernels.add_noise_(es_kernels.ParamTable(named_segments(model)), [1], [0.05])
    save_model(model, tokenizer, tmp_path / "runs" / "model")
    again, its_tokenizer, its_identity = load_model(tmp_path / "runs" / "model", device="cpu")
    assert fingerprint(again) == fingerprint(model)
    assert text(again, its_tokenizer) == text(model, tokenizer)
    assert {**identity, "model": ""} == {**its_identity, "model": ""}
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "model", dtype="auto")
    assert text(plain.eval(), transformers.AutoTokenizer.from_pretrained(tmp_path / "runs" / "model")) == text(
        model, tokenizer
    )
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["model"]


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_of_several_dtypes_are_loaded_as_they_were_saved(build_model, tmp_path, monkeypatch, sharded):
    tokenizer = transformers.AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    model = build_model("mixed")
    if sharded:
        monkeypatch.setattr(model, "save_pretrained", functools.partial(model.save_pretrained, max_shard_size="5KB"))
    save_model(model, tokenizer, tmp_path / "model")
    assert sharded == (len(list((tmp_path / "model").glob("*.safetensors"))) > 1)
    again, its_tokenizer, identity = load_model(tmp_path / "model", device="cpu")
    assert identity["dtype"] == "mixed" and {p.dtype for p in again.parameters()} == {torch.float32, torch.bfloat16}
    assert fingerprint(again) == fingerprint(model) and again.config.dtype == torch.bfloat16
    assert text(again, its_tokenizer) == text(model, tokenizer)
    save_model(again, tokenizer, tmp_path / "again")
    assert fingerprint(load_model(tmp_path / "again", device="cpu")[0]) == fingerprint(model)
    uniform, _, identity = load_model(tmp_path / "model", device="cpu", dtype="bfloat16")
    assert identity["dtype"] == "bfloat16" == str(uniform.dtype).removeprefix("torch.")
    with pytest.raises(
        ValueError,
        match="tensors of several dtypes, which this engine would make one: give --dtype, or use --engine hf",
    ):
        empty_model(str(tmp_path / "model"))
    assert empty_model(str(tmp_path / "model"), "bfloat16")[2] == torch.bfloat16


def test_experts_of_several_dtypes_too(save_tiny, build_model, tmp_path):
    model = build_model("mixtral").bfloat16()
    model.model.layers[1].mlp.experts.float()
    save_tiny(tmp_path / "base", "mixtral")
    save_model(model, transformers.AutoTokenizer.from_pretrained(EMBEDDED_MODEL), tmp_path / "model")
    assert fingerprint(load_model(tmp_path / "model", device="cpu")[0]) == fingerprint(model)


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel])
def test_a_wrapped_model_is_saved_as_itself(build_model, tmp_path, wrap):
    tokenizer = transformers.AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    model = build_model("llama")
    save_model(wrap(model), tokenizer, tmp_path / "model")
    assert fingerprint(load_model(tmp_path / "model", device="cpu")[0]) == fingerprint(model)


@pytest.mark.parametrize("change", [{}, {"do_sample": False}, {"do_sample": False, "max_new_tokens": 9}])
def test_generation_config_of_a_published_model(save_tiny, tmp_path, change):
    """As Qwen's: sampling by default. Set to greedy it cannot be saved as it is."""
    folder = tmp_path / "first"
    save_tiny(folder)
    published = {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "repetition_penalty": 1.05,
        "eos_token_id": [2, 3],
        "pad_token_id": 0,
    }
    (folder / "generation_config.json").write_text(json.dumps(published))
    model, tokenizer, _ = load_model(folder, device="cpu")
    for name, value in change.items():
        setattr(model.generation_config, name, value)
    before = model.generation_config.to_dict()
    save_model(model, tokenizer, tmp_path / "model")
    assert model.generation_config.to_dict() == before
    written = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    expected = {**published, **change}
    if change:
        expected = {k: v for k, v in expected.items() if k not in ("do_sample", "temperature", "top_p", "top_k")}
    assert {k: written.get(k) for k in expected} == expected
    assert not change or not {"temperature", "top_p", "top_k"} & {k for k, v in written.items() if v is not None}
    load_model(tmp_path / "model", device="cpu")


def test_an_older_folder_is_replaced_and_a_failure_leaves_it(build_model, tmp_path, monkeypatch):
    tokenizer = transformers.AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    folder = tmp_path / "model"
    save_model(build_model("qwen2"), tokenizer, folder)
    (folder / "stray").write_text("")
    model = build_model("llama")
    save_model(model, tokenizer, folder)
    assert not (folder / "stray").exists() and fingerprint(load_model(folder, device="cpu")[0]) == fingerprint(model)

    def full_disk(*args, **kwargs):
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(tokenizer, "save_pretrained", full_disk)
        save_model(build_model("qwen2"), tokenizer, folder)
    assert fingerprint(load_model(folder, device="cpu")[0]) == fingerprint(model)
    save_model(build_model("qwen2"), tokenizer, folder)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


# Models that also see


@pytest.fixture
def seeing(save_tiny, tmp_path):
    """Folder of a Gemma 3 with a vision tower."""
    folder = save_tiny(tmp_path / "seeing", "gemma3_vision")
    (tmp_path / "seeing" / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    return folder


SEES = re.compile("vision_tower|multi_modal_projector")


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_only_text_weights_are_tuned_and_it_is_said(seeing, lora_rank):
    said = r"^\d+ parameter\(s\) of Gemma3ForConditionalGeneration, e.g. .*vision_tower.*, take no part in text: they are frozen"
    with pytest.warns(UserWarning, match=said):
        model, _, identity = load_model(seeing, device="cpu", lora_rank=lora_rank)
    tuned = [name for name, p in model.named_parameters() if p.requires_grad]
    assert tuned and not any(SEES.search(name) for name in tuned) and identity["trainable"] < identity["parameters"]
    model(input_ids=torch.arange(3, 9)[None]).logits.sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == set(tuned)


@pytest.mark.filterwarnings("ignore:.*take no part in text")
def test_a_run_saves_all_that_was_loaded(seeing, build_model, tmp_path):
    from es_finetune import TrainConfig, Trainer

    before = transformers.AutoModelForCausalLM.from_pretrained(seeing).state_dict()
    options = {
        "generations": 1,
        "population": 2,
        "prompts": 2,
        "eval_items": 2,
        "max_new_tokens": 2,
        "sigma": 0.1,
        "lr": 0.1,
        "report_to": ["none"],
    }
    for given in (
        {},
        {"model": build_model("gemma3_vision"), "tokenizer": transformers.AutoTokenizer.from_pretrained(seeing)},
    ):
        run = tmp_path / f"run{len(given)}"
        Trainer(
            TrainConfig(model=seeing, task="countdown-char", shaping="ranks", output=str(run), **options), **given
        ).train()
        after = transformers.AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before if SEES.search(name))
        assert (run / "model" / "preprocessor_config.json").exists() == (not given)


def test_a_text_part_that_is_loaded_alone_is_named(seeing, monkeypatch):
    """As of Qwen 3.5, whose causal LM is its text part."""
    text = transformers.AutoModelForCausalLM.from_pretrained(seeing).config.text_config
    loaded = transformers.Gemma3ForCausalLM(text), {"missing_keys": []}
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: loaded)
    with pytest.warns(UserWarning, match="of model .*seeing only the text part, Gemma3ForCausalLM, is loaded"):
        load_model(seeing, device="cpu")


# LoRA


def test_a_new_adapter_is_all_that_is_trainable(save_tiny, tmp_path):
    folder = save_tiny(tmp_path)
    base, tokenizer, _ = load_model(folder, device="cpu")
    model, _, identity = load_model(folder, device="cpu", lora_rank=3)
    trained = {name: p for name, p in named_segments(model) if p.requires_grad}
    assert len(trained) == 2 * 7 * 2 and all(re.search(r"\.lora_[AB]\.weight$", name) for name in trained)
    assert identity["lora_rank"] == 3 and identity["class"] == "LlamaForCausalLM" and not model.training
    assert identity["trainable"] == sum(p.numel() for p in trained.values()) < identity["parameters"]
    assert text(model, tokenizer) == text(base, tokenizer)  # B is 0
    assert model.peft_config["default"].lora_alpha == 6


def test_a_router_that_returns_a_tuple_is_left_out_of_an_adapter(tmp_path):
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


def test_the_first_values_of_an_adapter(save_tiny, bits, tmp_path):
    """They are the kernels' noise for seed 0, of variance 1 / (3 * inputs), whatever torch's generator holds, which
    stays as it was."""
    folder = save_tiny(tmp_path)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    model = load_model(folder, device="cpu", lora_rank=8)[0]
    assert torch.equal(torch.get_rng_state(), state)
    for name, p in named_segments(model):
        if name.endswith("lora_A.weight"):
            expected = es_kernels.add_noise_(torch.zeros(p.shape), [0], [1 / math.sqrt(3 * p.shape[1])], name=name)
            assert torch.equal(bits(p), bits(expected)) and p.abs().sum() > 0
        elif name.endswith("lora_B.weight"):
            assert not p.any()
    prefix = "base_model.model.model.layers.0.self_attn."
    a = dict(named_segments(model))
    assert not torch.equal(a[f"{prefix}q_proj.lora_A.weight"], a[f"{prefix}k_proj.lora_A.weight"])


@pytest.fixture
def tuned(save_tiny, tmp_path):
    """(model with a moved adapter, tokenizer) over a bfloat16 base in tmp_path/base."""
    model, tokenizer, _ = load_model(save_tiny(tmp_path / "base"), device="cpu", dtype="bfloat16", lora_rank=2)
    with torch.no_grad():
        es_kernels.add_noise_(
            es_kernels.ParamTable((n, p) for n, p in named_segments(model) if p.requires_grad), [5], [0.3]
        )
    return model, tokenizer


def test_an_adapter_saved_and_loaded_again(tuned, tmp_path):
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


def test_merged_it_is_a_full_model_and_the_one_in_memory_stays(tuned, tmp_path):
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


def test_a_merged_mixture_keeps_its_checkpoint_names(save_tiny, tmp_path):
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
def test_a_merge_that_would_compute_otherwise_is_refused(build_model, tmp_path, kind, wrong, dtype):
    import peft

    tokenizer = transformers.AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    options = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(build_model(kind).to(dtype), options).eval()
    before = fingerprint(model)
    if wrong:
        said = f"cannot add this adapter into the weights of {kind.title()}ForCausalLM: logits would be off by .* merge_lora"
        with pytest.raises(ValueError, match=said):
            save_model(model, tokenizer, tmp_path / "merged", merge_lora=True)
        save_model(model, tokenizer, tmp_path / "adapter")
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    else:
        save_model(model, tokenizer, tmp_path / "merged", merge_lora=True)
        assert load_model(tmp_path / "merged", device="cpu")
    assert fingerprint(model) == before


# Refusals


def test_refuses_what_is_not_there(tmp_path):
    refused("the model.s folder .*nowhere does not exist", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("model .*empty could not be loaded", tmp_path / "empty")
    refused("dtype must be one of auto, float32, bfloat16, float16, not 'int8'", "embedded", dtype="int8")
    refused("lora_rank must be at least 0", "embedded", lora_rank=-1)
    refused("attn_implementation|nonsense", "embedded", attn_implementation="nonsense")
    refused("model embedded could not be loaded", "embedded", device="cuda:99")


def test_refuses_a_broken_checkpoint(save_tiny, build_model, tmp_path):
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


def test_refuses_quantised_and_odd_weights(save_tiny, build_model, tmp_path):
    save_tiny(tmp_path / "a")
    edit(tmp_path / "a" / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    refused("quantised weights.*float32, bfloat16 and float16", tmp_path / "a")
    save_tiny(tmp_path / "b")
    build_model("llama").double().save_pretrained(tmp_path / "b")
    refused("embed_tokens.weight is torch.float64", tmp_path / "b")
    assert load_model(tmp_path / "b", device="cpu", dtype="float32")[0].dtype == torch.float32


def test_pad_token(save_tiny, tmp_path):
    folder = save_tiny(tmp_path)
    edit(tmp_path / "tokenizer_config.json", pad_token=None)
    edit(tmp_path / "tokenizer.json", padding=None)
    refused(r"no pad token.*--pad_token.*'\$'", folder)
    refused("pad_token 'two words' is no token", folder, pad_token="two words")
    model, tokenizer, _ = load_model(folder, device="cpu", pad_token="$")
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("$", tokenizer.eos_token_id)
    save_model(model, tokenizer, tmp_path / "saved")
    assert load_model(tmp_path / "saved", device="cpu")[1].pad_token == "$"


def test_refuses_a_pad_token_that_the_model_does_not_embed(save_tiny, tmp_path):
    folder = save_tiny(tmp_path, vocab_size=12, pad_token_id=0)
    edit(tmp_path / "tokenizer_config.json", pad_token="?")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    last = max(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    refused("the model embeds 12 tokens", folder, pad_token=last)


def test_refuses_adapters_it_cannot_make(tuned, tmp_path, monkeypatch):
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
