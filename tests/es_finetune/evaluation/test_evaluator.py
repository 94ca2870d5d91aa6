"""Contract under test: an evaluation.

Each item is scored by its own answer. Means leave out what a score does not have and do not depend on order; digests
are equal where all answers are identical, and only there; failures are counted and the first is told. The headline is
the task's metric over all answers, failures included; its interval takes the question, not the answer, as what varies.
"""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import es_finetune.models
from es_finetune.engines import Answer
from es_finetune.engines.hf import HFEngine
from es_finetune.evaluation.evaluator import Evaluation, Evaluator, Unaskable, headline, in_parts, measure
from es_finetune.evaluation.statistics import interval
from es_finetune.tasks import Item, Score, load_task

EMBEDDED_MODEL = Path(es_finetune.models.__file__).parent / "embedded"


def evaluation(texts=(), scores=()):
    return Evaluation([Answer(text, tuple(range(len(text)))) for text in texts], list(scores), 1.0, 1.0)


def test_the_evaluator_scores_each_item_by_its_own_answer():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    task = load_task("countdown-char")
    engine = HFEngine(AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL).eval(), tokenizer, 12, 16)
    items = task.test[:40]
    result = Evaluator(engine, task, items)()
    assert result.answers == engine.generate(engine.encode([item.prompt for item in items]))
    assert result.scores == [task.score(item, answer.text) for item, answer in zip(items, result.answers, strict=True)]
    assert len(set(result.scores)) > 1
    assert result.mean("reward") == pytest.approx(0.1 * result.mean("format") + 0.9 * result.mean("exact"))
    assert result.seconds_generate > result.seconds_score > 0
    assert result.failed == 0 and result.error is None


def test_a_question_that_cannot_be_asked_is_named_by_where_it_is_from():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    engine = HFEngine(AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL).eval(), tokenizer, 12, 16)
    good, long = Item("1+1", 0, None, "a.jsonl, line 1"), "3" * 64
    for bad, words in (
        (
            Item(long, 1, None, "a.jsonl, line 7"),
            "^a.jsonl, line 7: the prompt has 64 tokens, too many for 12 new ones within",
        ),
        (Item(long, 1), r"^prompt 1, '3{57}...', has 64 tokens"),
        (
            Item(({"role": "user", "content": "hi"},), 1, None, "a.jsonl, line 7"),
            "^a.jsonl, line 7: the prompt is a chat, but the tokenizer has no",
        ),
        (Item(({"role": "user", "content": "hi"},), 1), "^prompt 1, 'hi', is a chat"),
    ):
        with pytest.raises(Unaskable, match=words):
            Evaluator(engine, load_task("countdown-char"), [good, bad])


@pytest.mark.parametrize(
    "reward, problem",
    [(math.nan, "the reward is nan"), (-1e200, r"reward is -1e\+200"), ("1", "of type str, not a number")],
)
def test_a_tasks_reward_that_is_no_finite_number_is_one_that_failed(reward, problem):
    class Given:
        def encode(self, prompts):
            return prompts

        def generate(self, prompts):
            return [Answer("a", (1,)) for _ in prompts]

        def score(self, item, completion):
            return Score(item.data, np.float32(0.5))

    given = Given()
    result = Evaluator(given, given, [Item("a", 0, np.float32(2.5)), Item("b", 1, reward)])()
    assert result.scores[0] == (2.5, 0.5, None, None) and json.dumps(result.scores[0])
    assert (
        result.scores[1][:3] == (None, None, None)
        and re.search(problem, result.scores[1].error)
        and not result.all_failed
    )


def test_means_leave_out_what_is_missing_and_do_not_depend_on_order():
    scores = [Score(1e16, 1.0), Score(None, error="broke"), Score(1.0, 0.0), Score(-1e16, None)]
    for order in (scores, scores[::-1]):
        result = evaluation(scores=order)
        assert result.mean("reward") == 1 / 3  # a plain sum gives 0
        assert result.mean("exact") == 0.5
        assert result.mean("format") is None


def test_failures_are_counted_and_the_first_is_told():
    worth_nothing = Score(0.0, 0.0, error="took too long")  # a grader's failure
    result = evaluation(scores=[Score(1.0), Score(None, error="KeyError: 'x'"), worth_nothing, Score(None)])
    assert result.failed == 3 and result.error == (1, "KeyError: 'x'")
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


class Echo:
    """An engine whose answers count how often it wrote one."""

    def __init__(self, temperature=0.0):
        self.temperature, self.written = temperature, 0

    def encode(self, prompts):
        return list(prompts)

    def generate(self, encoded):
        answers = []
        for prompt in encoded:
            answers.append(Answer(f"{prompt}{self.written}", (self.written,)))
            self.written += 1
        return answers


def make_task(score, metric="exact", floor=None):
    return SimpleNamespace(name="fake", metric=metric, floor=floor, score=score)


ITEMS = [Item(prompt, prompt) for prompt in "abcd"]


def test_greedy_right_or_wrong_gives_a_share_and_its_wilson_interval():
    task = make_task(lambda item, text: Score(-5.0, float(item.key in "ab")))
    measured = measure(Echo(), task, ITEMS)
    assert (measured.metric, measured.value) == ("exact", 0.5)
    assert (measured.values, measured.items) == ([1.0, 1.0, 0.0, 0.0], ITEMS)
    assert (measured.low, measured.high) == interval([1, 1, 0, 0])
    assert [answer.text for answer in measured.evaluation.answers] == ["a0", "b1", "c2", "d3"]


def test_several_samples_are_clustered_by_question():
    task = make_task(lambda item, text: Score(float(text[1:]), 1.0), metric="reward")
    measured = measure(Echo(temperature=1.0), task, ITEMS[:2], samples=3)
    assert [item.key for item in measured.items] == list("aaabbb")
    assert measured.values == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0] and measured.value == 2.5
    assert (measured.low, measured.high) == interval([1.0, 4.0])


def test_several_samples_of_right_or_wrong_are_not_so_many_questions():
    task = make_task(lambda item, text: Score(1.0, float(item.key in "ab")))
    measured = measure(Echo(temperature=1.0), task, ITEMS, samples=100)
    assert (measured.low, measured.high) == interval([1.0, 1.0, 0.0, 0.0])


def test_what_tells_nothing_is_refused():
    task = make_task(lambda item, text: Score(None, error=f"broke at {text}"), metric="reward")
    with pytest.raises(ValueError, match="20 samples of greedy answers are all the same"):
        measure(Echo(), task, ITEMS, samples=20)
    with pytest.raises(ValueError, match="task 'fake' has no questions"):
        measure(Echo(), task, [])
    with pytest.raises(ValueError, match="task 'fake': no answer could be scored; the first failure: broke at a0"):
        measure(Echo(), task, ITEMS)


def test_failed_answers_count():
    scores = [Score(2.0, 1.0), Score(None, error="broke"), Score(-1.0, 0.0)]
    assert headline(make_task(None), scores) == [1.0, 0.0, 0.0]
    assert headline(make_task(None, "reward"), scores) == [2.0, -1.0, -1.0]
    assert headline(make_task(None, "reward", floor=-7.0), scores) == [2.0, -7.0, -1.0]


def test_parts_differ_in_length_by_at_most_one_and_are_all_of_it():
    items = [Item(str(k), k) for k in range(11)]
    for parts in range(1, 12):
        runs = in_parts(items, parts)
        assert [item for run in runs for item in run] == items
        assert len(runs) == parts and max(map(len, runs)) - min(map(len, runs)) <= 1
