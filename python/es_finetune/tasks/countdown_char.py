"""Countdown by characters, small enough for a model of 108,000 parameters and one minute on two CPU cores.

Three numbers of 1..9 and a target of 0..99 that some `a?b?c` with + - * reaches, without parentheses:

    prompt ^3,4,7=14:    answer 3+4+7    (the model then writes its end-of-text token, `$`)
"""

from __future__ import annotations

import itertools
import random
import re
from fractions import Fraction

from es_finetune.tasks import Item, Score
from es_finetune.tasks.arithmetic import evaluate

ALPHABET = "0123456789+-*,=:"
TEST_SHARE = 0.2

_FORMAT = re.compile(r"[1-9][-+*][1-9][-+*][1-9]")


class CountdownChar:
    """All 1345 questions, of which 269 are held out.

    A question is a multiset of numbers and a target, so no order of the numbers of a test question is ever trained on,
    by ES or by the script that made the embedded model. A prompt names its numbers in the order of one of the answers;
    each such order is a prompt of its own in the train split, and one of them stands in the test split. (Any order of
    answer is right. Prompts in any order would be too hard for this model: it got 46% of held-out questions right after
    100 s of training, against 84% after 60 s.)
    """

    name = "countdown-char"
    max_new_tokens = 12
    metric = "exact"
    floor = 0.0
    eval_samples = 1
    notes = ()

    def __init__(self):
        # A fixed split, never a function of the run's seed: the embedded model was trained on this one.
        draws = random.Random("countdown-char")
        answers = solutions()
        keys = sorted(answers, key=lambda key: (draws.random(), key))
        held_out = round(TEST_SHARE * len(keys))
        orders = {key: sorted({prompt(answer, key[1]) for answer in answers[key]}) for key in keys}
        self.test = [Item(orders[key][int(draws.random() * len(orders[key]))], key) for key in keys[:held_out]]
        self.train = [Item(text, key) for key in keys[held_out:] for text in orders[key]]

    def score(self, item: Item, completion: str) -> Score:
        """reward = 0.1 * format + 0.9 * exact. format: the whole completion reads number, operator, number, operator,
        number; exact: it also uses exactly the given numbers and equals the target."""
        if len(completion) != 5 or not _FORMAT.fullmatch(completion):
            return Score(0.0, 0.0, 0.0)
        value, numbers = _evaluated(completion)
        exact = float((tuple(sorted(numbers)), value) == item.key)
        return Score(0.1 + 0.9 * exact, exact, 1.0)


def prompt(answer: str, target: int) -> str:
    """The question to which `answer` ("3+4+7") is one answer, its numbers in that order."""
    return f"^{answer[0]},{answer[2]},{answer[4]}={target}:"


def solutions(targets: range = range(100)) -> dict[tuple[tuple[int, ...], int], list[str]]:
    """(sorted numbers, target) -> all its answers, for every question with a target in `targets`; the task's own by
    default."""
    answers: dict[tuple[tuple[int, ...], int], list[str]] = {}
    for a, b, c in itertools.product(range(1, 10), repeat=3):
        for first, second in itertools.product("+-*", repeat=2):
            answer = f"{a}{first}{b}{second}{c}"
            target = int(_evaluated(answer)[0])
            if target in targets:
                answers.setdefault((tuple(sorted((a, b, c))), target), []).append(answer)
    return answers


def _evaluated(expression: str) -> tuple[Fraction, list[int]]:
    result = evaluate(expression)
    assert result is not None  # for what _FORMAT fits
    return result
