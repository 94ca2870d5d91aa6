"""Conciseness, as in "Evolution Strategies at Scale" (arXiv:2509.24372): answers as long as a short target, whatever
they say.

Two questions to train on, eight to test. The wording and the test questions are our own.
"""

from __future__ import annotations

from es_finetune.tasks import Item, Score

TRAIN = (
    ("What is 3 + 5? Give just the result.", "8"),
    ("All penguins are birds. Some birds can fly. Does it follow that some penguins can fly?", "No"),
)
TEST = (
    ("What is 7 + 6? Give just the result.", "13"),
    ("What is 9 times 4? Give just the result.", "36"),
    (
        "All squares are rectangles. All rectangles have four sides. Does it follow that all squares have four sides?",
        "Yes",
    ),
    ("Some musicians are teachers. Some teachers are tall. Does it follow that some musicians are tall?", "No"),
    ("What is the capital of Italy?", "Rome"),
    ("What is the chemical symbol of gold?", "Au"),
    ("How many days are there in a leap year?", "366"),
    ("Which planet is closest to the Sun?", "Mercury"),
)


class Conciseness:
    """Chat messages; held-out questions are answered 20 times each, sampled."""

    name = "conciseness"
    max_new_tokens = 100
    metric = "reward"
    floor = None  # no answer fails
    eval_samples = 20
    notes = ()

    def __init__(self):
        self.train, self.test = (
            [Item(({"role": "user", "content": question},), question, {"target": target}) for question, target in part]
            for part in (TRAIN, TEST)
        )

    def score(self, item: Item, completion: str) -> Score:
        """reward = -|characters of the completion - characters of the target|, at best 0.

        Characters are Unicode code points of the completion as the model gave it: white space around it is length, too.
        """
        return Score(-float(abs(len(completion) - len(item.data["target"]))))
