"""Contract under test: an evaluation.

Each item is scored by its own answer. Means leave out what a score does not have and do not depend on order; digests
are equal where all answers are identical, and only there; failures are counted and the first is told. Of several
samples the mean or the best counts; of answers that are read, their log-probability. The headline is the task's
metric over all answers, failures included; its interval takes the question, not the answer, as what varies.
"""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import es_finetune.models
from es_finetune.engines import Answer, Sampling
from es_finetune.engines.hf import HFEngine
from es_finetune.evaluation.evaluator import (
    Evaluation,
    Evaluator,
    HeldOut,
    LogProbEvaluator,
    Unaskable,
    headline,
    in_parts,
    measure,
)
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

        def generate(self, prompts, sampling):
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

    def __init__(self):
        self.written = 0

    def encode(self, prompts):
        return list(prompts)

    def generate(self, encoded, sampling):
        answers = []
        for prompt in encoded:
            answers.append(Answer(f"{prompt}{self.written}", (self.written,)))
            self.written += 1
        return answers


def make_task(score, metric="exact", floor=None):
    return SimpleNamespace(name="fake", metric=metric, floor=floor, score=score)


SAMPLING = Sampling(1.0, 0)
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
    measured = measure(Echo(), task, ITEMS[:2], 3, SAMPLING)
    assert [item.key for item in measured.items] == list("aaabbb")
    assert measured.values == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0] and measured.value == 2.5
    assert (measured.low, measured.high) == interval([1.0, 4.0])


def test_several_samples_of_right_or_wrong_are_not_so_many_questions():
    task = make_task(lambda item, text: Score(1.0, float(item.key in "ab")))
    measured = measure(Echo(), task, ITEMS, 100, SAMPLING)
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


# --- several samples, and answers that are read -----------------------------------------------------------------------


@pytest.mark.parametrize("floor, mean, best", [(None, 1.5, 2.0), (-6.0, -2.0, 2.0)])
def test_a_question_is_worth_the_mean_of_its_samples_or_the_best(floor, mean, best):
    """A sample whose scoring failed is worth the floor, or the lowest of all."""
    worth = {"a": [1.0, 2.0], "b": [2.0, None], "c": [None, None], "d": [1.0, 4.0]}
    task = make_task(lambda item, text: Score(worth[item.key][int(text[1:]) % 2]), floor=floor)
    for objective, expected in (("mean", [1.5, mean, None, 2.5]), ("best", [2.0, best, None, 4.0])):
        result = Evaluator(Echo(), task, ITEMS, samples=2, objective=objective)(SAMPLING)
        assert result.rewards == expected
        assert [answer.text for answer in result.answers] == ["a0", "a1", "b2", "b3", "c4", "c5", "d6", "d7"]
        assert result.failed == 3 and result.error[0] == 1 and result.tokens == 8


class Reader(Echo):
    """Of each token of an answer log p is minus its letter's number."""

    def encode_answers(self, prompts, answers):
        return list(zip(prompts, answers, strict=True))

    def log_probs(self, encoded):
        return [torch.tensor([-float(ord(letter) - 96) for letter in answer]) for _, answer in encoded]


READING = [
    {"prompt": "a", "answer": "abc"},
    {"prompt": "b", "answer": " b3 ", "rejected": "ab"},
    *({"prompt": p, "answer": "z"} for p in "cdef"),
]


@pytest.mark.parametrize("per_token, rewards", [(False, [-6.0, 174.0]), (True, [-2.0, 44.25])])
def test_answers_that_are_read_are_worth_their_log_probability(per_token, rewards):
    held_out, options = [{"prompt": "t", "answer": "t0"}], {"reward": "logprob", "logprob_per_token": per_token}
    task = load_task("custom", data=READING, test_data=held_out, **options)

    def read(items, engine=None):
        return LogProbEvaluator(engine or Reader(), task, items)()

    result = read(task.train[:2])
    assert result.rewards == rewards and result.scores == [Score(reward) for reward in rewards]
    assert (result.answers, result.tokens, result.failed) == ([], 0, 0)
    assert result.digest == read(task.train[:2]).digest != read(task.train[1:3]).digest
    broken = SimpleNamespace(encode_answers=zip, log_probs=lambda _: [torch.tensor([-math.inf])])
    (score,) = read(task.train[:1], broken).scores
    assert score.reward is None and "-inf" in score.error


def test_held_out_questions_of_a_task_that_reads_are_answered_too():
    held_out = [{"prompt": "t", "answer": "ab"}, {"prompt": "u", "answer": " u1\n"}]
    task = load_task("custom", data=READING, test_data=held_out, reward="logprob")
    result = HeldOut(Reader(), task, task.test)()
    assert [answer.text for answer in result.answers] == ["t0", "u1"]
    assert [(score.reward, score.exact) for score in result.scores] == [(-3.0, 0.0), (-(21 - 47 - 86 - 64.0), 1.0)]
    measured = measure(Reader(), task, task.test)
    assert (measured.metric, measured.values, measured.evaluation.rewards[0]) == ("exact", [0.0, 1.0], -3.0)
