"""Contract under test: a model of several dtypes keeps the dtype of each of its weights when it is saved and loaded
again (es_finetune.models.dtypes)."""

import functools

import pytest
import torch
import transformers

from es_finetune.models.load import EMBEDDED_MODEL, empty_model, load_model
from es_finetune.models.save import save_model


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_of_several_dtypes_are_loaded_as_they_were_saved(
    build_model, tmp_path, monkeypatch, sharded, text, fingerprint
):
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


def test_experts_of_several_dtypes_too(save_tiny, build_model, tmp_path, fingerprint):
    model = build_model("mixtral").bfloat16()
    model.model.layers[1].mlp.experts.float()
    save_tiny(tmp_path / "base", "mixtral")
    save_model(model, transformers.AutoTokenizer.from_pretrained(EMBEDDED_MODEL), tmp_path / "model")
    assert fingerprint(load_model(tmp_path / "model", device="cpu")[0]) == fingerprint(model)
