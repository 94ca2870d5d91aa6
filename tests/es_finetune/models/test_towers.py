"""Contract under test: the parts of a model that see are frozen, which is said, and saved as they were
(es_finetune.models.towers)."""

import re

import pytest
import torch
import transformers

from es_finetune import TrainConfig, Trainer
from es_finetune.models.load import load_model


@pytest.fixture
def seeing(save_tiny, tmp_path):
    """Folder of a Gemma 3 with a vision tower."""
    folder = save_tiny(tmp_path / "seeing", "gemma3_vision")
    (tmp_path / "seeing" / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    return folder


SEES = re.compile("vision_tower|multi_modal_projector")


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_only_text_weights_are_tuned_and_it_is_said(seeing, lora_rank, caplog):
    model, _, identity = load_model(seeing, device="cpu", lora_rank=lora_rank)
    (said,) = caplog.messages
    assert re.match(
        r"\d+ parameter\(s\) of Gemma3ForConditionalGeneration, e.g. .*vision_tower.*, take no part in text: "
        "they are frozen",
        said,
    )
    tuned = [name for name, p in model.named_parameters() if p.requires_grad]
    assert tuned and not any(SEES.search(name) for name in tuned) and identity["trainable"] < identity["parameters"]
    model(input_ids=torch.arange(3, 9)[None]).logits.sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == set(tuned)


def test_a_run_saves_all_that_was_loaded(seeing, build_model, tmp_path):
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
    for supplied in (
        {},
        {"model": build_model("gemma3_vision"), "tokenizer": transformers.AutoTokenizer.from_pretrained(seeing)},
    ):
        run = tmp_path / f"run{len(supplied)}"
        Trainer(
            TrainConfig(model=seeing, task="countdown-char", shaping="ranks", output=str(run), **options), **supplied
        ).train()
        after = transformers.AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before if SEES.search(name))
        assert (run / "model" / "preprocessor_config.json").exists() == (not supplied)


def test_a_text_part_that_is_loaded_alone_is_named(seeing, monkeypatch, caplog):
    """As of Qwen 3.5, whose causal LM is its text part."""
    text = transformers.AutoModelForCausalLM.from_pretrained(seeing).config.text_config
    loaded = transformers.Gemma3ForCausalLM(text), {"missing_keys": []}
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: loaded)
    load_model(seeing, device="cpu")
    assert f"of model {seeing} only the text part, Gemma3ForCausalLM, is loaded" in caplog.text
