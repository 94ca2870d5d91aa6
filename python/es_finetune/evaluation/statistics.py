"""How good a model is on a task, with error bars; how far it moved from its base; what it said.

The protocols of the tasks: countdown, 2000 test items, greedy, `measure(engine, task, task.test)`; conciseness, 8 test
questions, 20 samples each at temperature 1, `measure(engine, task, task.test, samples=20)`, and `kl_to_base` of these
answers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from es_finetune.engines import Answer, Engine
from es_finetune.errors import UserError
from es_finetune.evaluation.evaluator import Evaluation, Evaluator
from es_finetune.runs.files import write_atomically
from es_finetune.tasks import Item, Score, Task

_Z = 1.959963984540054  # the standard normal is within +-_Z with probability 0.95


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
    if evaluation.all_failed:
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


def interval(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """95 % confidence interval of the mean of `values`, one per question: answers to one question are alike, so of
    several the mean counts once.

    If each is 0 or 1: Wilson's score interval (E. B. Wilson, "Probable inference, the law of succession, and
    statistical inference", J. Am. Stat. Assoc. 22, 1927), which stays in [0, 1] and is right near 0 and 1 too. Else
    mean +- 1.96 standard errors (ddof 1), which is somewhat too narrow below 30 questions; (None, None) for a single
    one.
    """
    n = len(values)
    if not n:
        raise UserError("an interval needs at least one value")
    mean = math.fsum(values) / n
    if set(values) <= {0, 1}:
        centre = (mean + _Z * _Z / (2 * n)) / (1 + _Z * _Z / n)
        half = _Z / (1 + _Z * _Z / n) * math.sqrt(mean * (1 - mean) / n + _Z * _Z / (4 * n * n))
        return (centre - half if mean > 0 else 0.0), (centre + half if mean < 1 else 1.0)
    if n == 1:
        return None, None
    half = _Z * math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
    return mean - half, mean + half


class KL(NamedTuple):
    """Nats per token."""

    value: float
    standard_error: float | None
    tokens: int


def kl_to_base(
    answers: Sequence[Answer], tuned_log_probs: Sequence[torch.Tensor], base_log_probs: Sequence[torch.Tensor]
) -> KL:
    """KL(tuned || base) per token, estimated from `answers` that the tuned model sampled at temperature 1, whose
    tokens' log probabilities are given under both models (`HFEngine.log_probs`).

    The mean over all tokens of r - log r - 1 with r = p_base / p_tuned: unbiased, and of low variance as no term is
    negative (estimator k3 of J. Schulman, "Approximating KL divergence", 2020, joschu.net/blog/kl-approx.html). Its
    standard error takes whole answers as what was drawn, since the tokens of one depend on each other (linearised ratio
    of sums, ddof 1; None for a single answer).
    """
    sums, lengths = [], []
    for number, (answer, tuned, base) in enumerate(zip(answers, tuned_log_probs, base_log_probs, strict=True)):
        if not len(answer.ids) == len(tuned) == len(base):
            raise UserError(
                f"answer {number} has {len(answer.ids)} tokens but {len(tuned)} and {len(base)} log probabilities: "
                "both must be of these answers"
            )
        log_r = base.double() - tuned.double()
        sums.append((torch.expm1(log_r) - log_r).sum().item())
        lengths.append(len(answer.ids))
    tokens, n = sum(lengths), len(lengths)
    if not tokens:
        raise UserError("the KL divergence needs at least one token: all answers are empty")
    value = math.fsum(sums) / tokens
    spread = math.fsum((total - value * length) ** 2 for total, length in zip(sums, lengths))
    return KL(value, math.sqrt(spread * n / (n - 1)) / tokens if n > 1 else None, tokens)


def save_answers(path: Path, items: Sequence[Item], answers: Sequence[Answer], scores: Sequence[Score]) -> None:
    """JSON lines, one per answer: prompt (text, or the messages of a chat), completion, reward and exact (null where
    there is none), and for an answer whose scoring failed the error. Whole or not at all."""
    lines = []
    for item, answer, score in zip(items, answers, scores, strict=True):
        row = {"prompt": item.prompt, "completion": answer.text, "reward": score.reward, "exact": score.exact}
        lines.append(json.dumps(row | ({"error": score.error} if score.error else {})) + "\n")
    write_atomically(path, "".join(lines))
