"""Contract under test: a GGUF file is a model like any other: `--model FILE.gguf` and FOLDER:FILE.gguf load its weights
unpacked, a run of it is resumed, replayed, measured and exported as an ordinary folder, and its log names the file and
its digest (es_finetune.models.gguf). The files are written by the package gguf, as llama.cpp's converter does."""

import copy
import hashlib
import importlib.util
import json
import sys

import pytest
import torch
import transformers

import es_finetune
from es_finetune import TrainConfig, Trainer
from es_finetune.errors import UserError
from es_finetune.models.load import empty_model, load_model
from es_finetune.models.save import save_model
from es_finetune.runs.log import read_log
from es_finetune.tasks.countdown_char import ALPHABET
from es_finetune.workers import setup

TOKENS = ["<pad>", "<s>", "</s>", *"_^$?", *ALPHABET, *"hm", "hm"]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{letter}_proj": f"attn_{letter}" for letter in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
}
SHORT = {"generations": 2, "population": 4, "max_new_tokens": 4, "report_to": ["none"], "threads": 1}


@pytest.fixture(scope="module")
def original(build_model):
    return build_model(
        "llama", vocab_size=len(TOKENS), hidden_size=32, intermediate_size=32, num_key_value_heads=2, head_dim=16
    )


@pytest.fixture(scope="module")
def write(original):
    """write(path, kind="F32") -> path: the original as a GGUF file, its matrices in blocks of the kind."""
    import gguf

    def write(path, kind="F32"):
        config = original.config
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(TOKENS)
        special = [gguf.TokenType.CONTROL] * 3
        writer.add_token_types(special + [gguf.TokenType.NORMAL] * (len(TOKENS) - 3))
        writer.add_token_merges(["h m"])
        for place, add in enumerate((writer.add_pad_token_id, writer.add_bos_token_id, writer.add_eos_token_id)):
            add(place)
        for name, tensor in original.state_dict().items():
            values, parts = tensor.numpy(), name.removesuffix(".weight").split(".")
            if parts[-1] in ("q_proj", "k_proj"):  # llama.cpp turns the halves of a head into pairs
                values = values.reshape(config.num_attention_heads, 2, -1, config.hidden_size)
                values = values.swapaxes(1, 2).reshape(tensor.shape)
            block = f"blk.{parts[2]}." if "layers" in parts else ""
            quantization = gguf.GGMLQuantizationType[kind if tensor.ndim == 2 else "F32"]
            packed = gguf.quantize(values, quantization)
            key = NAMES[".".join(parts[3:] if block else parts)]
            writer.add_tensor(f"{block}{key}.weight", packed, raw_dtype=quantization)
        for write_part in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            write_part()
        writer.close()
        return path

    return write


@pytest.fixture(scope="module")
def packed(write, tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "tiny.Q4_1.gguf", "Q4_1")


@pytest.fixture(scope="module")
def options(packed):
    """Of a run of it, whose members share a batch and read answers."""
    data = packed.parent / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"^{n}=", "answer": f"{n}"}) + "\n" for n in range(10)))
    return {"model": packed, "data": data, "reward": "logprob", "noise_rank": 1, **SHORT}


@pytest.fixture(scope="module")
def run(packed, options):
    """(folder, summary)."""
    folder = packed.parent / "run"
    return folder, Trainer(TrainConfig(output=folder, **options)).train()


def test_weights_are_those_that_were_written(write, original, fingerprint, tmp_path):
    model, tokenizer, identity = load_model(write(tmp_path / "a.gguf"), device="cpu")
    assert fingerprint(model) == fingerprint(original) and identity["dtype"] == "float32"
    assert tokenizer.convert_tokens_to_ids(list("^3,4,7=14:")) == tokenizer("^3,4,7=14:")["input_ids"]
    assert (tokenizer.pad_token, tokenizer.eos_token_id, tokenizer.padding_side) == ("<pad>", 2, "left")
    rounded = copy.deepcopy(original).bfloat16()
    half = load_model(write(tmp_path / "b.gguf", "BF16"), device="cpu", dtype="bfloat16")[0]
    assert fingerprint(half) == fingerprint(rounded)
    assert fingerprint(load_model(tmp_path / "b.gguf", device="cpu")[0]) == fingerprint(half.float())


def test_packed_weights_are_unpacked(packed, original, text, tmp_path, fingerprint):
    model, tokenizer, identity = load_model(packed, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float32} and type(model.lm_head) is torch.nn.Linear
    for name, weight in original.named_parameters():  # a block of 32 values has 16 steps
        step = (weight.max() - weight.min()) / 15 if weight.ndim == 2 else 0
        assert (model.get_parameter(name) - weight).abs().max() <= step, name
    assert identity["file"] == "tiny.Q4_1.gguf"
    assert identity["sha256"] == hashlib.sha256(packed.read_bytes()).hexdigest()
    save_model(model, tokenizer, tmp_path / "model")
    assert "quantization_config" not in json.loads((tmp_path / "model" / "config.json").read_text())
    again, its_tokenizer, its_identity = load_model(tmp_path / "model", device="cpu")
    assert fingerprint(again) == fingerprint(model) and text(again, its_tokenizer) == text(model, tokenizer)
    assert "sha256" not in its_identity
    assert load_model(packed, device="cpu", dtype="bfloat16")[0].dtype == torch.bfloat16


def test_names(packed, monkeypatch, refused, tmp_path):
    digest = load_model(packed, device="cpu")[2]["sha256"]
    (tmp_path / packed.name).write_bytes(b"another file of the name")
    monkeypatch.chdir(tmp_path)
    assert load_model(f"{packed.parent}:{packed.name}", device="cpu")[2]["sha256"] == digest
    monkeypatch.chdir(packed.parent)
    assert load_model(packed.name, device="cpu")[2]["sha256"] == digest
    refused("the model.s file .*tiny.Q4_0.gguf does not exist: did you mean tiny.Q4_1.gguf", "tiny.Q4_0.gguf")
    refused("the model.s file .*tiny.Q4_0.gguf does not exist: did you mean", f"{packed.parent}:tiny.Q4_0.gguf")
    refused("model .*tiny.Q4_1.gguf could not be loaded", tmp_path / packed.name)
    with pytest.raises(UserError, match="is a GGUF file, which this engine cannot perturb: .*--engine hf"):
        empty_model(packed.name)
    config = setup._for_an_actor(TrainConfig(model=f".:{packed.name}", task="countdown-char"))
    assert config.model == str(packed)


def test_without_the_packages_the_extra_is_named(packed, monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else True)
    refused(r"model .*tiny.Q4_1.gguf needs the package gguf: pip install 'es-kernels\[gguf\]'", packed)


def test_a_run_of_a_file(packed, run, text, fingerprint, tmp_path):
    folder, summary = run
    header, generations = read_log(folder / "run.log")
    assert header["model"]["file"] == packed.name and header["config"]["model"] == str(packed)
    assert header["model"]["sha256"] == hashlib.sha256(packed.read_bytes()).hexdigest()
    assert len(generations) == 2 and summary["live"] != header["live"]

    rebuilt = es_finetune.replay(folder)
    exported = es_finetune.export(folder, output=tmp_path / "tuned")
    tuned, tokenizer, identity = load_model(exported.folder, device="cpu")
    assert exported.live == summary["live"] and fingerprint(tuned) == fingerprint(rebuilt.model)
    assert "file" not in identity
    assert text(tuned, tokenizer) == text(rebuilt.model, rebuilt.tokenizer)
    plain = transformers.AutoModelForCausalLM.from_pretrained(exported.folder)
    assert fingerprint(plain) == fingerprint(tuned)

    measured = es_finetune.evaluate(run=folder, output=tmp_path / "eval")
    assert measured["questions"] == 2
    base = es_finetune.evaluate(model=packed, task="countdown-char", items=4, output=tmp_path / "base")
    assert base["questions"] == 4

    # The same weights from an ordinary folder: the log knows them by fingerprint
    es_finetune.export(folder, output=tmp_path / "first", generation=0)
    assert es_finetune.replay(folder, model=tmp_path / "first").optimizer.generation == 2


def test_a_run_of_a_file_is_resumed(packed, options, run, tmp_path):
    class Stopping(es_finetune.Callback):
        def on_generation(self, trainer, row):
            trainer.stop()

    Trainer(TrainConfig(output=tmp_path / "run", **options), callbacks=[Stopping()]).train()
    resumed = Trainer.resume(tmp_path / "run", model=f"{packed.parent}:{packed.name}")
    assert resumed.generation == 1 and resumed.train()["live"] == run[1]["live"]
