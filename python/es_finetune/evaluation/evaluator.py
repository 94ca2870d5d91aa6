"""Answers of one set of weights to a set of questions, and what they are worth."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from es_finetune.engines import Answer, Engine
from es_finetune.engines.prompts import PromptError
from es_finetune.tasks import Item, Score, Task
from es_finetune.tasks.reward_process import number


@dataclass
class Evaluation:
    """Answers and scores in the items' order, and where the time went (seconds)."""

    answers: list[Answer]
    scores: list[Score]
    seconds_generate: float
    seconds_score: float

    def mean(self, part: str) -> float | None:
        """Mean of one part of the scores, "reward", "exact" or "format", over those that have it; None if none has.
        Exactly rounded, so independent of order."""
        return mean_of_known([getattr(score, part) for score in self.scores])

    @classmethod
    def joined(cls, parts: Sequence[Evaluation]) -> Evaluation:
        """Of questions that were asked in several parts; the seconds are the sum of the parts'."""
        answers, scores = ([entry for part in parts for entry in getattr(part, name)] for name in ("answers", "scores"))
        return cls(
            answers,
            scores,
            *(math.fsum(getattr(part, name) for part in parts) for name in ("seconds_generate", "seconds_score")),
        )

    @property
    def tokens(self) -> int:
        """How many were generated."""
        return sum(len(answer.ids) for answer in self.answers)

    @property
    def digest(self) -> str:
        """16 hex digits of all texts in order: equal where all answers are identical."""
        state = hashlib.blake2b(digest_size=8)
        for answer in self.answers:
            text = answer.text.encode("utf-8", "surrogatepass")
            # With its length, so that no two lists of texts run together
            state.update(len(text).to_bytes(8, "little") + text)
        return state.hexdigest()

    @property
    def failed(self) -> int:
        """How many answers were not scored as they should: the reward raised or hung, or the grader did, on which an
        answer is worth 0."""
        return sum(score.reward is None or score.error is not None for score in self.scores)

    @property
    def all_failed(self) -> bool:
        """Whether not one answer could be scored."""
        return all(score.reward is None for score in self.scores)

    @property
    def error(self) -> tuple[int, str] | None:
        """The first answer whose scoring failed, and why."""
        for place, score in enumerate(self.scores):
            if score.reward is None or score.error is not None:
                return place, score.error or "no reward and no reason given"
        return None


class Unaskable(ValueError):
    """A question whose prompt the model cannot be asked, in one line that says where it is from."""


class Evaluator:
    """One fixed set of questions, encoded once; call it for every member of a generation. Unaskable if one of them
    cannot be asked."""

    def __init__(self, engine: Engine, task: Task, items: Sequence[Item]):
        self.engine, self.task, self.items = engine, task, items
        self.encoded = encoded(items, engine.encode)

    def __call__(self) -> Evaluation:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # perturbing is queued, and no part of generating
        start = time.perf_counter()
        answers = self.engine.generate(self.encoded)
        generated = time.perf_counter()
        scores = [_plain(self.task.score(item, answer.text)) for item, answer in zip(self.items, answers, strict=True)]
        return Evaluation(answers, scores, generated - start, time.perf_counter() - generated)


def encoded(items: Sequence[Item], encode: Callable[[list], Any]) -> Any:
    """What `encode` makes of the items' prompts. Unaskable for a prompt that it refuses."""
    try:
        return encode([item.prompt for item in items])
    except PromptError as error:
        item = items[error.number]
        text = item.prompt if isinstance(item.prompt, str) else item.prompt[-1]["content"]
        where = (
            f"{item.source}: the prompt"
            if item.source
            else f"prompt {error.number}, {text if len(text) <= 60 else text[:57] + '...'!r},"
        )
        raise Unaskable(f"{where} {' '.join(error.problem.split())}") from error


def _plain(score: Score) -> Score:
    """With Python's numbers, as log and journal hold them; a reward that is no finite number counts as one that
    failed."""
    try:
        parts = [
            None if part is None else number(part, name) for name, part in zip(("the reward", "exact", "format"), score)
        ]
    except ValueError as error:
        return Score(None, error=str(error))
    return Score(*parts, score.error)


def mean_of_known(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are not None; None if none is."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def share_identical(digests: Sequence[str]) -> float:
    """Share of members, given by the digests of their answers, whose answers are those of another."""
    return sum(digests.count(digest) > 1 for digest in digests) / len(digests)
