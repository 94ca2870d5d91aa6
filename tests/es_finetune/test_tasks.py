"""Contract under test: the tasks.

- Train and test share no question; a question is a multiset of numbers and a target. The items are the same for ever.
- An answer gets credit only if it uses exactly the given numbers and has the value; hostile text gets none, raises nothing
  and costs next to nothing. Arithmetic is exact and nothing is ever evaluated as code.
"""

import itertools
import time
from fractions import Fraction

import pytest

from es_finetune.tasks import Item, check_disjoint, load_task
from es_finetune.tasks.arithmetic import MAX_DEPTH, MAX_LENGTH, evaluate
from es_finetune.tasks.countdown import Countdown
from es_finetune.tasks.countdown_char import CountdownChar, solutions

HOSTILE = [
    "",
    "9**9**9**9",
    "(" * 100_000,
    "(" * 100_000 + "1" + ")" * 100_000,
    "-" * 100_000 + "1",
    "1+" * 50_000 + "1",
    "9" * 100_000,
    "3+4+7+1/0",
    "3+4+7 if 1 else 0",
    "__import__('os').getcwd()",
    "３+４+７",  # full-width digits, which str.isdigit and \d accept
    "³+4+7",
    "3+4+٧",
    "nan",
    "inf",
    "1e9",
    "0x0e",
    "3+4+7\n",
    "3+4+7\x00",
    "3+4+07",
    "3_+4+7",
    "3,4,7",
    "3 4 7",
    "3+4+7)",
    "()",
    "3+*4+7",
    "3//4",
    "<answer>" * 20_000,
    "\ud800",
]


@pytest.mark.parametrize(
    "text, value, numbers",
    [
        ("3+4+7", 14, [3, 4, 7]),
        (" ( 1 + 2 ) / 3 ", 1, [1, 2, 3]),
        ("1/3*3", 1, [1, 3, 3]),
        ("2-3-4", -5, [2, 3, 4]),
        ("8/2/2", 2, [8, 2, 2]),
        ("2+3*4", 14, [2, 3, 4]),
        ("-(2-5)", 3, [2, 5]),
        ("1/3+1/6", Fraction(1, 2), [1, 3, 1, 6]),
        ("0", 0, [0]),
    ],
)
def test_arithmetic_is_exact(text, value, numbers):
    assert evaluate(text) == (value, numbers)


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:20]))
def test_arithmetic_refuses_what_is_none(text):
    start = time.perf_counter()
    assert evaluate(text) is None
    assert time.perf_counter() - start < 0.05


def test_arithmetic_bounds_are_where_they_are_said_to_be():
    def nested(depth):
        return "(" * depth + "1" + ")" * depth

    assert evaluate(nested(MAX_DEPTH)) == (1, [1]) and evaluate(nested(MAX_DEPTH + 1)) is None
    assert evaluate("1" + " " * (MAX_LENGTH - 1)) and evaluate("1" + " " * MAX_LENGTH) is None


# --- countdown -------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:20]))
@pytest.mark.parametrize("frame", ["{}", "x</think>\n<answer>{}</answer>", "<answer>{}", "{}</answer>"])
def test_countdown_gives_hostile_answers_at_most_their_format(text, frame):
    start = time.perf_counter()
    score = Countdown.score(None, ITEM, frame.format(text))
    assert time.perf_counter() - start < 0.05
    assert score.exact == (text == "3+4+7\n" and "</think>" in frame)  # white space around an answer is no fault
    assert score.reward == pytest.approx(score.exact + 0.1 * score.format) and score.format <= 1


# --- countdown-char --------------------------------------------------------------------------------------------------


def test_countdown_char_splits_by_multiset_and_target():
    task = load_task("countdown-char")
    train, test = ({item.key for item in items} for items in (task.train, task.test))
    assert not train & test and len(train) + len(test) == 1345
    assert len(test) == len(task.test)
    for item in [*task.train, *task.test]:
        numbers, target = item.prompt[1:-1].split("=")
        assert (tuple(sorted(map(int, numbers.split(",")))), int(target)) == item.key
    assert [item.prompt for item in CountdownChar().test] == [item.prompt for item in task.test]
    assert task.test[0].prompt == '^1,8,7=2:'  # the embedded model was trained on this split: it must never move


def test_countdown_char_knows_every_answer():
    task = CountdownChar()
    for (numbers, target), answers in solutions().items():
        assert 0 <= target <= 99
        for answer in answers:
            assert task.score(Item("", (numbers, target)), answer) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    "completion, exact, format",
    [("3+4+7", 1, 1), ("7+3+4", 1, 1), ("3+4*7", 0, 1), ("3+4+8", 0, 1), ("hm,3+4+7", 0, 0), ("3+4+7+", 0, 0), ("3+4", 0, 0), ("7+7+0", 0, 0)],
)
def test_countdown_char_scores(completion, exact, format):
    score = CountdownChar.score(None, ITEM, completion)
    assert score == (pytest.approx(0.1 * format + 0.9 * exact), exact, format)


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:20]))
def test_countdown_char_gives_hostile_answers_nothing(text):
    assert CountdownChar.score(None, ITEM, text) == (0, 0, 0)


# --- loading ---------------------------------------------------------------------------------------------------------


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match="unknown task 'sudoku'; choose one of: countdown-char, countdown"):
        load_task("sudoku")


def test_overlapping_splits_are_refused():
    task = Countdown(train=3, test=3)
    task.test.append(task.train[0])
    with pytest.raises(ValueError, match="both in train and in test"):
        check_disjoint(task)
