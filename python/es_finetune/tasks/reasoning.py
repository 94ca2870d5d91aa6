"""Any dataset of the package reasoning-gym: puzzles with generators and scorers of their own (mini_sudoku, arc_agi,
...)."""

from __future__ import annotations

import difflib
import random
from pathlib import Path

from es_finetune.errors import UserError, require
from es_finetune.tasks import Item, Score
from es_finetune.tasks.extract import last_block
from es_finetune.tasks.reward_process import RewardError, RewardProcess
from es_finetune.tasks.sandbox import finite_number

TRAIN, TEST = 200, 500
GENERATION_SECONDS = 300.0  # under 10 for nearly all datasets; puzzle24 takes 45, futoshiki 160, knight_swap 200
MAX_ANSWER = 20_000  # characters; a 30 x 30 grid of arc_agi has 1,800


class Reasoning:
    """200 questions to train on, 500 to test, from one stream with repetitions dropped; `seed` decides them.

    A dataset with fewer than 700 different questions is cut in the same proportion. Questions are made and answers
    scored in a process that can be killed: some datasets are slow, some scorers evaluate what they are given.
    """

    max_new_tokens = 1024
    metric = "exact"
    floor = 0.0
    eval_samples = 1

    def __init__(self, name: str, seed: int, seconds: float):
        self.name = f"reasoning-gym:{name}"
        require(f"the task {self.name!r}", "tasks", "reasoning_gym")
        # The package counts seeds up question by question, so its streams of neighbouring seeds are nearly the same.
        stream = int(random.Random(f"reasoning-gym {seed}").random() * (1 << 31))
        self._process = RewardProcess(
            f"{Path(__file__).with_name('graders') / 'reasoning.py'}:serve", GENERATION_SECONDS
        )
        try:
            made = self._process(name, {"seed": stream, "count": TRAIN + TEST})
        except RewardError as error:
            raise UserError(f"task {self.name!r}: its questions cannot be made: {error}") from None
        self._process.seconds = seconds
        if "unknown" in made:
            close = difflib.get_close_matches(name, made["unknown"], n=5, cutoff=0.4)
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise UserError(f"reasoning-gym has no dataset {name!r}{hint}")
        questions = made["questions"]
        if len(questions) < 10:
            raise UserError(
                f"task {self.name!r}: only {len(questions)} different questions, too few to train and test on"
            )
        train = min(TRAIN, len(questions) * TRAIN // (TRAIN + TEST))
        self.notes = (
            []
            if len(questions) == TRAIN + TEST
            else [f"{self.name} has no more than {len(questions)} different questions"]
        )
        items = [
            Item(
                ({"role": "system", "content": made["system"].strip()}, {"role": "user", "content": question}),
                question,
                {"name": name, "entry": entry},
            )
            for question, entry in questions
        ]
        self.train, self.test = items[:train], items[train:]

    def score(self, item: Item, completion: str) -> Score:
        """reward: the dataset's score of the last <answer> block, which gives part of the credit for some wrong
        answers; exact: 1 if that score is 1; format: 1 if there is such a block.

        No block, an answer of more than 20,000 characters or one that the scorer fails on is worth 0; `error` then says
        why.
        """
        answer = last_block(completion, "answer")
        if answer is None:
            return Score(0.0, 0.0, 0.0)
        answer = answer.strip()
        if len(answer) > MAX_ANSWER:
            return Score(0.0, 0.0, 1.0)
        try:
            reward = finite_number(self._process(answer, item.data), "the score")
        except (RewardError, ValueError) as error:
            return Score(0.0, 0.0, 1.0, f"{self.name}: {error}; answer {answer[:60]!a}")
        return Score(reward, float(reward >= 1), 1.0)
