"""Answers of one set of weights to a set of questions, and what they are worth.

The protocols of the tasks: countdown, 2000 test items, greedy, `measure(engine, task, task.test)`; conciseness, 8 test
questions, 20 samples each at temperature 1, `measure(engine, task, task.test, 20, Sampling(1.0, seed))`, and
`statistics.kl_to_base` of these answers.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from es_finetune.engines import Answer, Engine, Sampling
from es_finetune.engines.prompts import PromptError
from es_finetune.errors import UserError
from es_finetune.evaluation.statistics import interval, mean_of_known
from es_finetune.models.members import MemberNoise
from es_finetune.tasks import Item, ReadingTask, Score, Task, reads
from es_finetune.tasks.sandbox import finite_number


@dataclass
class Evaluation:
    """Answers and scores in the items' order, and where the time went (seconds). Of an item that was asked several
    times they stand in a row; where answers were read and not written there are scores only. `rewards`: one for each
    item, None where scoring failed."""

    answers: list[Answer]
    scores: list[Score]
    seconds_generate: float
    seconds_score: float
    rewards: list[float | None] = field(default_factory=list)

    def __post_init__(self):
        if not self.rewards:
            self.rewards = [score.reward for score in self.scores]

    def mean(self, part: str) -> float | None:
        """Mean of one part of the scores, "reward", "exact" or "format", over those that have it; None if none has.
        Exactly rounded, so independent of order."""
        return mean_of_known([getattr(score, part) for score in self.scores])

    @classmethod
    def joined(cls, parts: Sequence[Evaluation]) -> Evaluation:
        """Of questions that were asked in several parts; the seconds are the sum of the parts'."""
        answers, scores, rewards = (
            [entry for part in parts for entry in getattr(part, name)] for name in ("answers", "scores", "rewards")
        )
        generating, scoring = (
            math.fsum(getattr(part, name) for part in parts) for name in ("seconds_generate", "seconds_score")
        )
        return cls(answers, scores, generating, scoring, rewards)

    @property
    def tokens(self) -> int:
        """How many were generated."""
        return sum(len(answer.ids) for answer in self.answers)

    @property
    def digest(self) -> str:
        """16 hex digits of all texts in order, or without any of all rewards: equal where all are identical."""
        state = hashlib.blake2b(digest_size=8)
        for said in [answer.text for answer in self.answers] or map(repr, self.rewards):
            text = said.encode("utf-8", "surrogatepass")
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
        """The first item of which the scoring of an answer failed, and why."""
        samples = len(self.scores) // max(1, len(self.rewards))
        for place, score in enumerate(self.scores):
            if score.reward is None or score.error is not None:
                return place // samples, score.error or "no reward and no reason given"
        return None


def in_parts(items: Sequence[Item], parts: int) -> list[Sequence[Item]]:
    """`items` in so many runs, whose lengths differ by at most one; `Evaluation.joined` is the way back."""
    ends = [len(items) * part // parts for part in range(parts + 1)]
    return [items[start:end] for start, end in itertools.pairwise(ends)]


class Unaskable(UserError):
    """A question whose prompt the model cannot be asked, in one line that says where it is from."""


class Evaluator:
    """One fixed set of questions, encoded once, to ask of every member of a generation: by a call of one that is in
    place, by `together` of several that share a batch.

    Args:
        engine: Who answers; a MembersEngine where members share a batch.
        task: Scores the answers.
        items: The questions.
        samples: How often each is asked.
        objective: Its reward is that of its "best" sample, or their "mean".
        members: How many share a batch at most.

    Raises:
        Unaskable: One of them cannot be asked.
    """

    def __init__(
        self,
        engine: Any,
        task: Task,
        items: Sequence[Item],
        *,
        samples: int = 1,
        objective: str = "mean",
        members: int = 1,
    ):
        self.engine, self.task, self.items = engine, task, items
        self.samples, self.objective = samples, objective
        self.shared = {"members": members} if members > 1 else {}  # not every engine knows of it
        self.encoded = self._encoded()

    def __call__(self, sampling: Sampling | None = None) -> Evaluation:
        """What the weights of this moment come to. `sampling`: None is greedy."""
        start = _now()
        result = self._ask(sampling)
        return self._evaluation(result, time.perf_counter() - start)

    def together(self, noise: Sequence[MemberNoise], sampling: Sampling | None = None) -> list[Evaluation]:
        """What each member comes to, with an equal part of the seconds."""
        start = _now()
        results = self._ask_members(noise, sampling)
        seconds = (time.perf_counter() - start) / len(results)
        return [self._evaluation(result, seconds) for result in results]

    def _encoded(self) -> Any:
        asked = [item for item in self.items for _ in range(self.samples)]
        return encoded(asked, lambda prompts: self.engine.encode(prompts, **self.shared))

    def _ask(self, sampling: Sampling | None) -> list[Any]:
        return self.engine.generate(self.encoded, sampling)

    def _ask_members(self, noise: Sequence[MemberNoise], sampling: Sampling | None) -> list[list[Any]]:
        return self.engine.generate_members(self.encoded, noise, sampling)

    def _evaluation(self, answers: list[Any], seconds: float) -> Evaluation:
        start = time.perf_counter()
        scores = [_plain(self.task.score(item, answer.text)) for item, answer in self._pairs(answers)]
        rewards = rewards_of_items(self.task, scores, self.samples, self.objective)
        return Evaluation(answers, scores, seconds, time.perf_counter() - start, rewards)

    def _pairs(self, answers: list[Any]) -> Iterator[tuple[Item, Any]]:
        return zip((item for item in self.items for _ in range(self.samples)), answers, strict=True)


class LogProbEvaluator(Evaluator):
    """The same for a task whose answers are read: one forward pass, no text."""

    task: ReadingTask

    def _encoded(self) -> Any:
        self.read = [self.task.answers(item) for item in self.items]
        asked = [item for item, texts in zip(self.items, self.read, strict=True) for _ in texts]
        texts = [text for texts in self.read for text in texts]
        return encoded(asked, lambda prompts: self.engine.encode_answers(prompts, texts, **self.shared))

    def _ask(self, sampling: Sampling | None) -> list[Any]:
        return self.engine.log_probs(self.encoded)

    def _ask_members(self, noise: Sequence[MemberNoise], sampling: Sampling | None) -> list[list[Any]]:
        return self.engine.log_probs_members(self.encoded, noise)

    def _evaluation(self, log_probs: list[Any], seconds: float) -> Evaluation:
        start, left = time.perf_counter(), iter(log_probs)
        scores = [
            _plain(self.task.score_log_probs(item, [next(left).tolist() for _ in texts]))
            for item, texts in zip(self.items, self.read, strict=True)
        ]
        return Evaluation([], scores, seconds, time.perf_counter() - start)


class HeldOut:
    """One fixed set of held-out questions: a call answers and scores them. Of a task whose answers are read the rewards
    are log-probabilities, as in training. Arguments and errors as for Evaluator."""

    def __init__(self, engine: Engine, task: Task, items: Sequence[Item]):
        self._written = Evaluator(engine, task, items)
        self._read = LogProbEvaluator(engine, task, items) if reads(task) else None

    def __call__(self, sampling: Sampling | None = None) -> Evaluation:
        written = self._written(sampling)
        if self._read is None:
            return written
        read = self._read()
        scores = [
            answer._replace(reward=score.reward, error=score.error or answer.error)
            for answer, score in zip(written.scores, read.scores, strict=True)
        ]
        seconds = written.seconds_generate + read.seconds_generate, written.seconds_score + read.seconds_score
        return Evaluation(written.answers, scores, *seconds)


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # perturbing is queued, and no part of generating
    return time.perf_counter()


def encoded(items: Sequence[Item], encode: Callable[[list], Any]) -> Any:
    """What `encode` makes of the items' prompts. Unaskable for a prompt that it refuses."""
    try:
        return encode([item.prompt for item in items])
    except PromptError as error:
        item = items[error.number]
        text = item.prompt if isinstance(item.prompt, str) else item.prompt[-1]["content"]
        where = (
            f"{item.source}: the {error.what}"
            if item.source
            else f"{error.what} {error.number}, {text if len(text) <= 60 else text[:57] + '...'!r},"
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


def measure(
    engine: Engine, task: Task, items: Sequence[Item], samples: int = 1, sampling: Sampling | None = None
) -> Measurement:
    """Ask each question `samples` times and score the answers. ValueError without items, for several greedy samples,
    which would all be the same, and where no answer at all could be scored."""
    if not items:
        raise UserError(f"task {task.name!r} has no questions to measure on: give it test data")
    if samples > 1 and sampling is None:
        raise UserError(
            f"{samples} samples of greedy answers are all the same: set a temperature above 0, or samples to 1"
        )
    asked = [item for item in items for _ in range(samples)]
    evaluation = HeldOut(engine, task, asked)(sampling)
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


def rewards_of_items(task: Task, scores: Sequence[Score], samples: int, objective: str) -> list[float | None]:
    """The reward of each item that was asked so often: the mean of its answers', or the best.

    Args:
        task: Its floor is what an answer is worth whose scoring failed; without one the lowest of these rewards.
        scores: Of each item in turn those of all its answers.
        samples: How many these are.
        objective: "mean" or "best".

    Returns:
        One for each item; None where no answer of it could be scored.
    """
    if samples == 1:
        return [score.reward for score in scores]
    filled = rewards_of(task, scores)
    worth = max if objective == "best" else lambda rewards: math.fsum(rewards) / samples
    return [
        None
        if all(score.reward is None for score in scores[start : start + samples])
        else worth(filled[start : start + samples])
        for start in range(0, len(scores), samples)
    ]


def headline(task: Task, scores: Sequence[Score]) -> list[float]:
    """The task's metric for each score. An answer whose scoring failed is not exact."""
    return [score.exact or 0.0 for score in scores] if task.metric == "exact" else rewards_of(task, scores)
