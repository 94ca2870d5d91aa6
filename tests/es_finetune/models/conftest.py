"""Fixtures of tests/es_finetune/models: the text a model writes, its fingerprint, refusals, a tuned adapter."""

import json

import pytest
import torch

import es_kernels
from es_finetune.errors import UserError
from es_finetune.models.checkpoint_names import named_segments
from es_finetune.models.load import load_model


@pytest.fixture(scope="session")
def text():
    """text(model, tokenizer) -> tokens of two prompts and the greedy answers to them."""

    def text(model, tokenizer):
        batch = tokenizer(["^1,2,3=6:", "^7=7:"], return_tensors="pt", padding=True, return_token_type_ids=False)
        return model.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id).tolist()

    return text


@pytest.fixture(scope="session")
def fingerprint():
    """fingerprint(model, trainable=False) of its weights, or of those alone that are tuned."""

    def fingerprint(model, trainable=False):
        entries = [entry for entry in named_segments(model) if entry.tensor.requires_grad or not trainable]
        return es_kernels.fingerprint(es_kernels.ParamTable(entries))

    return fingerprint


@pytest.fixture(scope="session")
def refused():
    """refused(match, *args, **kwargs): load_model refuses these arguments in one line."""

    def refused(match, *args, **kwargs):
        with pytest.raises(UserError, match=match) as caught:
            load_model(*args, **{"device": "cpu", **kwargs})
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500

    return refused


@pytest.fixture(scope="session")
def edit():
    """edit(path, **changes) of a JSON file; None takes a field away."""

    def edit(path, **changes):
        path.write_text(
            json.dumps({k: v for k, v in {**json.loads(path.read_text()), **changes}.items() if v is not None})
        )

    return edit


@pytest.fixture
def tuned(save_tiny, tmp_path):
    """(model with a moved adapter, tokenizer) over a bfloat16 base in tmp_path/base."""
    model, tokenizer, _ = load_model(save_tiny(tmp_path / "base"), device="cpu", dtype="bfloat16", lora_rank=2)
    with torch.no_grad():
        es_kernels.add_noise_(
            es_kernels.ParamTable(entry for entry in named_segments(model) if entry.tensor.requires_grad), [5], [0.3]
        )
    return model, tokenizer
