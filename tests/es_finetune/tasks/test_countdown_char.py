"""Contract under test: the task countdown-char (es_finetune.tasks.countdown_char). Its split never moves, every
answer is known, and only a whole answer counts."""

import pytest

from es_finetune.tasks import Item, load_task
from es_finetune.tasks.countdown_char import CountdownChar, solutions

ITEM = Item("", ((3, 4, 7), 14))


def test_countdown_char_splits_by_multiset_and_target():
    task = load_task("countdown-char")
    train, test = ({item.key for item in items} for items in (task.train, task.test))
    assert not train & test and len(train) + len(test) == 1345
    assert len(test) == len(task.test)
    for item in [*task.train, *task.test]:
        numbers, target = item.prompt[1:-1].split("=")
        assert (tuple(sorted(map(int, numbers.split(",")))), int(target)) == item.key
    assert [item.prompt for item in CountdownChar().test] == [item.prompt for item in task.test]
    assert task.test[0].prompt == "^1,8,7=2:"  # the embedded model was trained on this split: it must never move


def test_countdown_char_knows_every_answer():
    task = CountdownChar()
    for (numbers, target), answers in solutions().items():
        assert 0 <= target <= 99
        for answer in answers:
            assert task.score(Item("", (numbers, target)), answer) == (1.0, 1.0, 1.0, None)


@pytest.mark.parametrize(
    "completion, exact, format",
    [
        ("3+4+7", 1, 1),
        ("7+3+4", 1, 1),
        ("3+4*7", 0, 1),
        ("3+4+8", 0, 1),
        ("hm,3+4+7", 0, 0),
        ("3+4+7+", 0, 0),
        ("3+4", 0, 0),
        ("7+7+0", 0, 0),
    ],
)
def test_countdown_char_scores(completion, exact, format):
    score = CountdownChar.score(None, ITEM, completion)
    assert score == (pytest.approx(0.1 * format + 0.9 * exact), exact, format, None)


def test_countdown_char_gives_hostile_answers_nothing(hostile):
    assert CountdownChar.score(None, ITEM, hostile) == (0, 0, 0, None)
