"""Contract under test: the evaluation loop.

A completion depends on its prompt and on the weights of this moment only: not on its place, its batch's padding or what was
generated before (no KV cache survives a weight change). It ends at the end-of-text token, and is greedy whatever sampling
options the checkpoint carries.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from es_finetune import EvolutionStrategy
from es_finetune.evaluate import Evaluator, HFEngine
from es_finetune.tasks import load_task
from es_finetune.trainer import EMBEDDED_MODEL


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL).eval()


PROMPTS = [item.prompt for item in load_task("countdown-char").test[:40]]


def test_completions_come_in_the_order_of_the_prompts_whatever_the_batches(model, tokenizer):
    assert len({len(prompt) for prompt in PROMPTS}) > 1  # so batches are padded
    one_by_one = HFEngine(model, tokenizer, 12, 1)
    batched = HFEngine(model, tokenizer, 12, 16)
    expected = one_by_one.generate(one_by_one.encode(PROMPTS))
    assert len(set(expected)) > 20
    assert batched.generate(batched.encode(PROMPTS)) == expected
    assert batched.generate(batched.encode(PROMPTS[::-1])) == expected[::-1]


def test_rows_are_left_padded_and_of_similar_length(model, tokenizer):
    batches = HFEngine(model, tokenizer, 12, 8).encode(PROMPTS)
    assert sorted(i for rows, _ in batches for i in rows) == list(range(len(PROMPTS)))
    lengths = [inputs["attention_mask"].sum(1) for _, inputs in batches]
    assert torch.equal(torch.cat(lengths), torch.cat(lengths).sort(descending=True).values)
    for rows, inputs in batches:
        assert inputs["attention_mask"][:, -1].all()
        assert [tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(*inputs.values())] == [PROMPTS[i] for i in rows]


def test_a_completion_ends_at_the_end_token(model, tokenizer):
    engine = HFEngine(model, tokenizer, 12, 64)
    for text in engine.generate(engine.encode(PROMPTS)):
        assert 0 < len(text) < 12 and not set(text) & set("_^$")


def test_nothing_survives_a_weight_change(model, tokenizer):
    engine = HFEngine(model, tokenizer, 12, 64)
    encoded = engine.encode(PROMPTS)
    before = engine.generate(encoded)
    opt = EvolutionStrategy(model.named_parameters(), sigma=0.05, population=2)
    with opt.perturbed(0):
        inside = engine.generate(encoded)
        fresh = HFEngine(model, tokenizer, 12, 64)
        assert inside == fresh.generate(fresh.encode(PROMPTS)) != before
    assert engine.generate(encoded) == before


def test_sampling_options_of_the_checkpoint_do_not_matter(model, tokenizer):
    engine = HFEngine(model, tokenizer, 12, 64)
    before = engine.generate(engine.encode(PROMPTS))
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, top_p=0.5, repetition_penalty=5.0, max_new_tokens=2)
    engine = HFEngine(model, tokenizer, 12, 64)
    assert engine.generate(engine.encode(PROMPTS)) == before


def test_the_evaluator_scores_each_item_by_its_own_completion(model, tokenizer):
    task = load_task("countdown-char")
    evaluation = Evaluator(HFEngine(model, tokenizer, 12, 16), task, task.test[:40])()
    assert evaluation.scores == [task.score(item, text) for item, text in zip(task.test, evaluation.completions)]
    assert evaluation.mean("reward") == pytest.approx(0.1 * evaluation.mean("format") + 0.9 * evaluation.mean("exact"))
    assert evaluation.seconds_generate > evaluation.seconds_score > 0


def test_a_tokenizer_that_cannot_pad_is_refused(model):
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    tokenizer.padding_side = "right"
    with pytest.raises(ValueError, match="pads on the right"):
        HFEngine(model, tokenizer, 12, 16)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no pad token"):
        HFEngine(model, tokenizer, 12, 16)
