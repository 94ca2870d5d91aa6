"""Answers of one set of weights to a set of questions, and what they are worth.

The protocols of the tasks: countdown, 2000 test items, greedy, `measure(engine, task, task.test)`; conciseness, 8 test
questions, 20 samples each at temperature 1, `measure(engine, task, task.test, samples=20)`, and
`statistics.kl_to_base` of these answers.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from es_finetune.engines import Answer, Engine, MembersEngine
from es_finetune.engines.prompts import PromptError
from es_finetune.errors import UserError
from es_finetune.evaluation.statistics import interval, mean_of_known
from es_finetune.models.members import MemberNoise
from es_finetune.tasks import Item, Score, Task
from es_finetune.tasks.sandbox import finite_number


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


def in_parts(items: Sequence[Item], parts: int) -> list[Sequence[Item]]:
    """`items` in so many runs, whose lengths differ by at most one; `Evaluation.joined` is the way back."""
    ends = [len(items) * part // parts for part in range(parts + 1)]
    return [items[start:end] for start, end in itertools.pairwise(ends)]


class Unaskable(UserError):
    """A question whose prompt the model cannot be asked, in one line that says where it is from."""


class Evaluator:
    """One fixed set of questions, encoded once; call it for every member of a generation. Unaskable if one of them
    cannot be asked."""

    def __init__(self, engine: Engine, task: Task, items: Sequence[Item]):
        self.engine, self.task, self.items = engine, task, items
        self.encoded = encoded(items, engine.encode)

    def __call__(self) -> Evaluation:
        start = _now()
        answers = self.engine.generate(self.encoded)
        return _scored(self.task, self.items, answers, time.perf_counter() - start)


class MembersEvaluator:
    """The same for members that share a batch, so many or fewer. A call takes their noise and returns an Evaluation of
    each, with an equal part of the seconds."""

    def __init__(self, engine: MembersEngine, task: Task, items: Sequence[Item], members: int):
        self.engine, self.task, self.items = engine, task, items
        self.encoded = encoded(items, lambda prompts: engine.encode(prompts, members))

    def __call__(self, noise: Sequence[MemberNoise]) -> list[Evaluation]:
        start = _now()
        answers = self.engine.generate_members(self.encoded, noise)
        seconds = (time.perf_counter() - start) / len(answers)
        return [_scored(self.task, self.items, of_member, seconds) for of_member in answers]


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # perturbing is queued, and no part of generating
    return time.perf_counter()


def _scored(task: Task, items: Sequence[Item], answers: list[Answer], seconds_generate: float) -> Evaluation:
    start = time.perf_counter()
    scores = [_plain(task.score(item, answer.text)) for item, answer in zip(items, answers, strict=True)]
    return Evaluation(answers, scores, seconds_generate, time.perf_counter() - start)


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
    parts = {"the reward": score.reward, "exact": score.exact, "format": score.format}
    try:
        reward, exact, format = (None if part is None else finite_number(part, name) for name, part in parts.items())
    except ValueError as error:
        return Score(None, error=str(error))
    return Score(reward, exact, format, score.error)


@dataclass
class Measurement:
    """`value`: mean of the task's headline metric over all answers; `low`, `high`: its 95 % interval (None where one
    question tells nothing of the spread). `items` has each question `samples` times in a row, as answers and scores in
    `evaluation` and the metric's `values`."""

    metric: str
    value: float
    low: float | None
    high: float | None
    samples: int
    items: list[Item]
    values: list[float]
    evaluation: Evaluation


def measure(engine: Engine, task: Task, items: Sequence[Item], samples: int = 1) -> Measurement:
    """Ask each question `samples` times and score the answers. ValueError without items, for several samples of a
    greedy engine, which would all be the same, and where no answer at all could be scored."""
    if not items:
        raise UserError(f"task {task.name!r} has no questions to measure on: give it test data")
    if samples > 1 and not engine.temperature:
        raise UserError(
            f"{samples} samples of greedy answers are all the same: set a temperature above 0, or samples to 1"
        )
    asked = [item for item in items for _ in range(samples)]
    evaluation = Evaluator(engine, task, asked)()
    if evaluation.all_failed and evaluation.error is not None:
        raise UserError(f"task {task.name!r}: no answer could be scored; the first failure: {evaluation.error[1]}")
    values = headline(task, evaluation.scores)
    questions = [math.fsum(values[start : start + samples]) / samples for start in range(0, len(values), samples)]
    low, high = interval(questions)
    return Measurement(task.metric, math.fsum(values) / len(values), low, high, samples, asked, values, evaluation)


def floor_of(task: Task, rewards: Iterable[float | None]) -> float:
    """What an answer is worth whose scoring failed: the task's floor, or where that is None the lowest of these
    rewards, or 0 without any."""
    return min((reward for reward in rewards if reward is not None), default=0.0) if task.floor is None else task.floor


def rewards_of(task: Task, scores: Sequence[Score]) -> list[float]:
    """The reward of each score, of one that failed the floor among them."""
    floor = floor_of(task, (score.reward for score in scores))
    return [floor if score.reward is None else score.reward for score in scores]


def headline(task: Task, scores: Sequence[Score]) -> list[float]:
    """The task's metric for each score. An answer whose scoring failed is not exact."""
    return [score.exact or 0.0 for score in scores] if task.metric == "exact" else rewards_of(task, scores)
