"""Contract under test: what save_model writes, from_pretrained reads, with the same bits and the same text. The folder
is at no time half of it (es_finetune.models.save)."""

import json

import pytest
import torch
import transformers

import es_kernels
from es_finetune.models.checkpoint_names import named_segments
from es_finetune.models.load import EMBEDDED_MODEL, load_model
from es_finetune.models.save import save_model


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mixtral", "qwen3_moe"])
def test_saved_and_loaded_again(save_tiny, tmp_path, kind, text, fingerprint):
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


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel])
def test_a_wrapped_model_is_saved_as_itself(build_model, tmp_path, wrap, fingerprint):
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


def test_an_older_folder_is_replaced_and_a_failure_leaves_it(build_model, tmp_path, monkeypatch, fingerprint):
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
