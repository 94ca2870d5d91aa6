"""Contract under test: the task countdown (es_finetune.tasks.countdown).

- The questions are the same for ever, and each has an answer.
- An answer gets credit only if it uses exactly the given numbers and has the value, within the paper's tolerance.
- Hostile text gets no credit for its answer, raises nothing and costs next to nothing.
"""

import itertools
from fractions import Fraction

import pytest

from es_finetune.tasks import Item, load_task
from es_finetune.tasks.countdown import Countdown

ITEM = Item("", ((3, 4, 7), 14))


def test_countdown_is_the_papers():
    task = load_task("countdown")
    assert (len(task.train), len(task.test), task.max_new_tokens) == (200, 2000, 1024)
    keys = [item.key for item in [*task.train, *task.test]]
    assert len(set(keys)) == 2200
    for item in [*task.train, *task.test]:
        numbers, target = item.key
        assert len(numbers) in (3, 4) and all(1 <= n <= 99 for n in numbers) and 10 <= target <= 100
        assert item.prompt.endswith("\n<think>") and f" {target}. " in item.prompt
    assert {len(key[0]) for key in keys} == {3, 4}
    assert [item.prompt for item in Countdown().test] == [item.prompt for item in task.test]
    assert task.test[0] not in Countdown(seed=1).test
    assert task.train[0].key == ((35, 43, 47), 31)


def test_every_countdown_question_has_an_answer():
    def reachable(values):
        if len(values) == 1:
            yield values[0]
        for i, j in itertools.permutations(range(len(values)), 2):
            rest = [v for k, v in enumerate(values) if k not in (i, j)]
            a, b = values[i], values[j]
            for value in (a + b, a - b, a * b) + ((a / b,) if b else ()):
                yield from reachable([*rest, value])

    for item in Countdown().train[:30]:
        assert item.key[1] in reachable([Fraction(n) for n in item.key[0]])


@pytest.mark.parametrize(
    "completion, exact, format",
    [
        ("so</think>\n<answer>3+4+7</answer>", 1, 1.0),
        ("</think>\n<answer> 7 + (4 + 3) </answer>", 1, 1.0),
        ("so</think> <answer>3+4+7</answer>", 1, 0.6),  # no newline between the blocks
        ("so</think>\n<answer>3+4+7</answer>.", 1, 0.6),
        ("<answer>3+4+7</answer>", 1, 0.5),
        ("so</think>", 0, 0.1),
        ("so</think>\n<answer>3*4+7</answer>", 0, 1.0),
        ("so</think>\n<answer>7+7</answer>", 0, 1.0),
        ("so</think>\n<answer>3+4+7+0</answer>", 0, 1.0),
        ("so</think>\n<answer>14</answer>", 0, 1.0),
        ("a</think>\n<answer>3+4+7</answer> no, <answer>1</answer>", 0, 0.6),  # the last one counts
        ("a</think>\n<answer>1</answer> no, <answer>3+4+7</answer>", 1, 0.6),
        ("</answer></think>", 0, 0.1),
        ("3+4+7", 0, 0.0),
    ],
)
def test_countdown_scores(completion, exact, format):
    score = Countdown(train=1, test=1).score(ITEM, completion)
    assert (score.exact, score.format) == (exact, pytest.approx(format))
    assert score.reward == pytest.approx(exact + 0.1 * format)


def test_countdown_accepts_the_papers_tolerance_and_no_more():
    task = Countdown(train=1, test=1)
    near = Item("", ((1, 14, 9999), 14))
    assert task.score(near, "</think>\n<answer>14+1/9999</answer>").exact == 0
    near = Item("", ((1, 14, 999, 999), 14))
    assert task.score(near, "</think>\n<answer>14+1/999/999</answer>").exact == 1


@pytest.mark.parametrize("frame", ["{}", "x</think>\n<answer>{}</answer>", "<answer>{}", "{}</answer>"])
def test_countdown_gives_hostile_answers_at_most_their_format(hostile, frame, within):
    with within(3):
        score = Countdown.score(None, ITEM, frame.format(hostile))
    assert score.exact == (hostile == "3+4+7\n" and "</think>" in frame)  # white space around an answer is no fault
    assert score.reward == pytest.approx(score.exact + 0.1 * score.format) and score.format <= 1


def test_countdown_takes_the_seed():
    assert load_task("countdown", seed=1).train[0] not in Countdown().train
