"""Contract under test: the task short-answers is worth log p of a reference answer; held-out answers are exact where
they are that answer, and no training question asks what a held-out one does (es_finetune.tasks.short_answers)."""

import pytest

from es_finetune.tasks import load_task, reads
from es_finetune.tasks.short_answers import MOST_WORDS, TEST, TRAIN, ShortAnswers


def test_questions():
    task = load_task("short-answers")
    assert reads(task) and task.metric == "exact" and (len(task.train), len(task.test)) == (94, 70)
    for item in [*task.train, *task.test]:
        assert [message["role"] for message in item.prompt] == ["system", "user"]
        assert item.prompt[0]["content"] == "" and item.prompt[1]["content"] == item.key
        assert task.answers(item) == (item.data,) and 0 < len(item.data.split()) <= MOST_WORDS
    assert task.train[0][:3] == (task.train[0].prompt, "What is the capital of France?", "Paris")
    assert len({item.key for item in [*task.train, *task.test]}) == 164
    assert len(TEST.keys() - TRAIN.keys()) == 3  # kinds that no training saw


def test_sums_are_right():
    sums = [item for item in [*ShortAnswers().train, *ShortAnswers().test] if "+" in item.key]
    assert len(sums) == 30
    for item in sums:
        assert sum(map(int, item.key.removeprefix("What is ").rstrip("?").split("+"))) == int(item.data)


@pytest.mark.parametrize(
    "completion, exact, short",
    [
        ("Oslo", 1, 1),
        (" oslo\n", 1, 1),
        ("Oslo.", 0, 1),
        ("Copenhagen", 0, 1),
        ("The capital of Norway is Oslo.", 0, 0),
        ("Oslo, of course", 0, 0),
        ("", 0, 0),
    ],
)
def test_score(completion, exact, short):
    task = ShortAnswers()
    [norway] = (item for item in task.test if item.key == "What is the capital of Norway?")
    assert task.score(norway, completion) == (exact, exact, short, None)


def test_reward_is_the_log_probability_of_all_tokens():
    task = ShortAnswers()
    assert task.score_log_probs(task.train[0], [[-1.5, -0.25]]) == (-1.75, None, None, None)


def test_hostile_answers_are_wrong(hostile, within):
    task = ShortAnswers()
    with within(3):
        assert task.score(task.test[0], hostile).exact == 0
