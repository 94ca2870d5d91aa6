"""Countdown, as in "Evolution Strategies at Scale" (arXiv:2509.24372): reach a target from given numbers with + - * /.

200 questions to train on, 2000 to test; 3 or 4 integers of 1..99, targets 10..100. The prompt's wording is our own.
"""

from __future__ import annotations

import random
from fractions import Fraction

from es_finetune.tasks import Item, Score
from es_finetune.tasks.arithmetic import evaluate
from es_finetune.tasks.extract import last_block

OPENED = "<think>"  # the prompt ends with it, so a completion begins inside the block
MAX_COMPLETION = 50_000  # characters; 1024 tokens of reasoning are about 4,000
TOLERANCE = Fraction(1, 100_000)


class Countdown:
    """`seed` decides the questions; the same seed gives the same ones on every Python version."""

    name = "countdown"
    max_new_tokens = 1024
    metric = "exact"
    floor = 0.0
    eval_samples = 1
    notes = ()

    def __init__(self, seed: int = 0, train: int = 200, test: int = 2000):
        # One draw without repetition, then a cut: that is what makes the splits disjoint. A question is its multiset of
        # numbers and its target, so two orders of the same numbers are one question.
        draws = random.Random(f"countdown {seed}")
        items: dict[tuple, Item] = {}
        while len(items) < train + test:
            numbers = [1 + _below(draws, 99) for _ in range(3 + _below(draws, 2))]
            target = _random_value(draws, numbers)
            key = (tuple(sorted(numbers)), target)
            if target is not None and 10 <= target <= 100 and key not in items:
                items[key] = Item(prompt(numbers, target), key)
        ordered = list(items.values())
        self.train, self.test = ordered[:train], ordered[train:]

    def score(self, item: Item, completion: str) -> Score:
        """reward = exact + 0.1 * format.

        exact: the LAST answer block is an expression over + - * / ( ) that uses exactly the given numbers and is within
        1e-5 of the target. format: 1 for exactly a think block, a newline and an answer block; else 0.1 for a think
        block plus 0.5 for an answer block. Only the completion counts, the opened think tag put back in front of it. A
        completion of more than 50,000 characters is worth 0.
        """
        if len(completion) > MAX_COMPLETION:
            return Score(0.0, 0.0, 0.0)
        text = OPENED + completion
        thought = last_block(text, "think")
        answer = last_block(text, "answer")
        if thought is not None and text == f"<think>{thought}</think>\n<answer>{answer}</answer>":
            format = 1.0
        else:
            format = 0.1 * (thought is not None) + 0.5 * (answer is not None)
        numbers, target = item.key
        result = evaluate(answer.strip()) if answer is not None else None
        exact = float(
            result is not None and tuple(sorted(result[1])) == numbers and abs(result[0] - target) <= TOLERANCE
        )
        return Score(exact + 0.1 * format, exact, format)


def prompt(numbers: list[int], target: int) -> str:
    """Raw text, no chat template; it ends with an opened think tag."""
    return (
        "You are a helpful assistant. You reason about the problem in your mind first and then give the user the "
        "answer.\n"
        f"With the numbers [{' '.join(map(str, numbers))}], write an equation that equals {target}. Use each number "
        "exactly once, "
        "and only the operations +, -, * and /. Put your work inside <think> </think> tags and the final answer inside "
        "<answer> </answer> tags, for example <answer>(1 + 2) / 3</answer>. Solve this step by step.\n" + OPENED
    )


def _random_value(draws: random.Random, numbers: list[int]) -> int | None:
    """Value of a random expression that uses each number once; None where it is no integer."""
    values = [Fraction(n) for n in numbers]
    while len(values) > 1:
        a = values.pop(_below(draws, len(values)))
        b = values.pop(_below(draws, len(values)))
        operation = "+-*/"[_below(draws, 4)]
        if operation == "/" and b == 0:
            return None
        values.append(
            a + b if operation == "+" else a - b if operation == "-" else a * b if operation == "*" else a / b
        )
    return int(values[0]) if values[0].denominator == 1 else None


def _below(draws: random.Random, n: int) -> int:
    # Python promises stable values across versions for random() alone, not for randrange() or choice().
    return int(draws.random() * n)
