"""Numbers about numbers: means, their intervals, and how far one model is from another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from es_finetune.engines import Answer
from es_finetune.errors import UserError

_Z = 1.959963984540054  # the standard normal is within +-_Z with probability 0.95


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


def mean_of_known(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are not None; None if none is."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def share_identical(digests: Sequence[str]) -> float:
    """Share of members, given by the digests of their answers, whose answers are those of another."""
    return sum(digests.count(digest) > 1 for digest in digests) / len(digests)


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
    spread = math.fsum((total - value * length) ** 2 for total, length in zip(sums, lengths, strict=True))
    return KL(value, math.sqrt(spread * n / (n - 1)) / tokens if n > 1 else None, tokens)
