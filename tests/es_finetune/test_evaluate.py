"""Contract under test: an evaluation.

Each item is scored by its own answer. Means leave out what a score does not have and do not depend on order; digests are equal where all
answers are identical, and only there; failures are counted and the first is told.
"""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import es_finetune.models
from es_finetune.engines import Answer
from es_finetune.engines.hf import HFEngine
from es_finetune.evaluate import Evaluation, Evaluator
from es_finetune.tasks import Score, load_task

EMBEDDED_MODEL = Path(es_finetune.models.__file__).parent / "countdown_char"


def evaluation(texts=(), scores=()):
    return Evaluation([Answer(text, tuple(range(len(text)))) for text in texts], list(scores), 1.0, 1.0)


def test_the_evaluator_scores_each_item_by_its_own_answer():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    task = load_task("countdown-char")
    engine = HFEngine(AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL).eval(), tokenizer, 12, 16)
    items = task.test[:40]
    found = Evaluator(engine, task, items)()
    assert found.answers == engine.generate(engine.encode([item.prompt for item in items]))
    assert found.scores == [task.score(item, answer.text) for item, answer in zip(items, found.answers, strict=True)]
    assert len(set(found.scores)) > 1
    assert found.mean("reward") == pytest.approx(0.1 * found.mean("format") + 0.9 * found.mean("exact"))
    assert found.seconds_generate > found.seconds_score > 0
    assert found.failed == 0 and found.error is None


def test_means_leave_out_what_is_missing_and_do_not_depend_on_order():
    scores = [Score(1e16, 1.0), Score(None, error="broke"), Score(1.0, 0.0), Score(-1e16, None)]
    for order in (scores, scores[::-1]):
        found = evaluation(scores=order)
        assert found.mean("reward") == 1 / 3  # a plain sum gives 0
        assert found.mean("exact") == 0.5
        assert found.mean("format") is None


def test_failures_are_counted_and_the_first_is_told():
    worth_nothing = Score(0.0, 0.0, error="took too long")  # a grader's failure
    found = evaluation(scores=[Score(1.0), Score(None, error="KeyError: 'x'"), worth_nothing, Score(None)])
    assert found.failed == 3 and found.error == (1, "KeyError: 'x'")
    assert evaluation(scores=[Score(1.0), worth_nothing]).error == (1, "took too long")
    assert evaluation(scores=[Score(None)]).error == (0, "no reward and no reason given")


def test_equal_digests_are_identical_answers():
    digest = evaluation(["ab", "c"]).digest
    assert len(digest) == 16 and int(digest, 16) >= 0
    assert evaluation(["ab", "c"]).digest == digest
    others = [["c", "ab"], ["a", "bc"], ["abc"], ["ab", "c", ""], ["", "ab", "c"], ["ab", "d"], ["ab\0", "c"]]
    assert len({evaluation(texts).digest for texts in others} | {digest}) == len(others) + 1
    assert evaluation(["\ud800"]).digest != evaluation(["?"]).digest  # any text has one


def test_tokens_are_counted():
    assert evaluation(["ab", "", "cde"]).tokens == 5
