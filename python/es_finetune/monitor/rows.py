"""What a run measures of itself: lines of the journal, rows of metrics.jsonl and evals.jsonl, summary.json. Plain
numbers, seconds and bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypedDict, get_args, get_type_hints

import numpy

from es_finetune.evaluation.evaluator import Evaluation, headline, rewards_of
from es_finetune.evaluation.statistics import interval, mean_of_known, share_identical
from es_finetune.tasks import Task

Row = dict[str, Any]  # a row as it is read from a file, whatever wrote it


class Health(TypedDict):
    """What is measured of the weights now and then, on a sample of each tensor; all over the tuned weights."""

    correlation: Annotated[
        dict[str, list[float]],
        "by tensor [correlation, rms realised / rms intended] of the noise, where the correlation is under 0.9",
    ]
    correlation_min: Annotated[
        list[Any] | None,
        "[tensor, correlation] of realised and intended noise, where lowest; null for tiny tensors and "
        "for members in one batch, whose noise no dtype of weights rounds",
    ]
    rms_ratio_min: Annotated[list[Any] | None, "[tensor, rms realised / rms intended] of the noise, where smallest"]
    step_correlation: Annotated[
        float | None, "correlation of the weights' change with the update before rounding; null without an update"
    ]
    step_rms: Annotated[float, "root mean square of the weights' change by the update"]
    drift: Annotated[float, "root mean square of the weights' distance from those before the first update"]
    drift_relative: Annotated[float | None, "drift, divided by the root mean square of those; null if they are 0"]


class _SometimesInGenerationRow(TypedDict, total=False):
    health: Annotated[Health, "every health_every generations and in the last: see below"]
    dropped: Annotated[list[int], "members given up as stragglers, where there are any"]


class GenerationRow(_SometimesInGenerationRow):
    """A line of metrics.jsonl: one generation. Rewards are means over its training prompts."""

    generation: Annotated[int, "its number, from 0"]
    sigma: Annotated[float, "scale of the noise, of the first param_group"]
    lr: Annotated[float, "scale of the update, of the first param_group"]
    reward_mean: Annotated[float, "mean over the members"]
    reward_std: Annotated[float, "standard deviation between members (ddof 0)"]
    reward_min: Annotated[float, "of the worst member"]
    reward_max: Annotated[float, "of the best member"]
    reward_q25: Annotated[float, "a quarter of the members are at or below it"]
    reward_q50: Annotated[float, "half of the members are at or below it"]
    reward_q75: Annotated[float, "three quarters of the members are at or below it"]
    reward_low: Annotated[float | None, "95 % interval of reward_mean over the prompts: low end; null under 8 prompts"]
    reward_high: Annotated[float | None, "high end"]
    exact_mean: Annotated[float | None, "share of right answers; null where the task knows none"]
    format_mean: Annotated[float | None, "mean of the reward's part for format; null where there is none"]
    seconds: Annotated[float, "of the whole generation, members of an earlier process included"]
    seconds_generate: Annotated[float, "in generating answers, summed over the workers"]
    seconds_score: Annotated[float, "in scoring them, summed over the workers"]
    workers: Annotated[int, "how many there were"]
    share_outside: Annotated[float, "share of seconds * workers outside of answering and scoring, 0 to 1"]
    tokens: Annotated[int, "generated, of all members"]
    answer_tokens: Annotated[float | None, "mean length of an answer; null where none is written"]
    tokens_per_second: Annotated[float, "of generating, of all workers together"]
    identical: Annotated[float, "share of members that answer every prompt as another member does, 0 to 1"]
    failed: Annotated[int, "answers whose scoring failed, of all members"]
    failed_example: Annotated[str | None, "the first of them, and why"]
    seconds_kernels: Annotated[float, "in the noise kernels, summed over the workers"]
    theta: Annotated[str, "fingerprint of the exact weights after the update, 16 hex digits"]
    live: Annotated[str, "fingerprint of the weights that the model computes with"]
    peak_memory_bytes: Annotated[int, "of the GPU's allocator, or without GPU of the process, since the run began"]
    warnings: Annotated[list[str], "what a user should know, one sentence each"]


class EvalRow(TypedDict):
    """A line of evals.jsonl: answers of the tuned weights, without noise, to the held-out questions."""

    generation: Annotated[int, "updates done before; 0: the base model"]
    items: Annotated[int, "questions"]
    reward: Annotated[float, "mean; an answer whose scoring failed counts as the floor"]
    reward_low: Annotated[float | None, "its 95 % interval: low end; null under 8 questions"]
    reward_high: Annotated[float | None, "high end"]
    exact: Annotated[float | None, "share of right answers; null where the task knows none"]
    format: Annotated[float | None, "mean of the reward's part for format; null where there is none"]
    failed: Annotated[int, "answers whose scoring failed"]
    answer_tokens: Annotated[float, "mean length of an answer"]
    answer_tokens_q10: Annotated[float, "a tenth of the answers are at most as long"]
    answer_tokens_q90: Annotated[float, "nine tenths of the answers are at most as long"]
    low: Annotated[float | None, "95 % interval of the task's metric, exact or reward: low end; null for one question"]
    high: Annotated[float | None, "high end"]
    seconds: Annotated[float, "in generating and scoring"]


class Summary(TypedDict):
    """summary.json: what a complete run came to. Without it the run is in progress, or was broken off."""

    task: Annotated[str, "its name"]
    model: Annotated[str, "as it was asked for"]
    metric: Annotated[str, "the headline on held-out questions: exact or reward"]
    base: Annotated[float | None, "the metric of the base model; null if that eval was lost"]
    base_interval: Annotated[list[float | None], "its 95 % interval"]
    final: Annotated[float, "the metric at the end"]
    final_interval: Annotated[list[float | None], "its 95 % interval"]
    held_out: Annotated[int, "questions of the last eval"]
    held_out_curve: Annotated[list[list[float]], "[updates done, metric] of each eval"]
    seconds_total: Annotated[float, "of all generations and evals, of all processes"]
    seconds_generate: Annotated[float, "in generating, of all generations and workers"]
    seconds_score: Annotated[float, "in scoring"]
    seconds_kernels: Annotated[float, "in the noise kernels"]
    share_outside: Annotated[float | None, "share of the workers' time outside of answering and scoring, 0 to 1"]
    tokens: Annotated[int, "generated in training"]
    generations: Annotated[int, "updates done"]
    backend: Annotated[str, "of es_kernels"]
    noise_version: Annotated[int, "of the noise's definition"]
    seed: Annotated[int, "of the run"]
    fingerprint: Annotated[str, "of the exact weights at the end (theta), 16 hex digits"]
    live: Annotated[str, "of the weights that the model computes with"]
    log_bytes: Annotated[int, "size of run.log"]


class MemberLine(TypedDict):
    """A line of the journal: one member of the generation in progress, scored. The file adds `crc`, the CRC-32 of what
    stands before it."""

    generation: Annotated[int, "from 0"]
    member: Annotated[int, "from 0"]
    rewards: Annotated[
        list[float | None], "of each training prompt, of several samples the mean or best; null where scoring failed"
    ]
    exact: Annotated[float | None, "share of right answers; null where the task knows none"]
    format: Annotated[float | None, "mean of the reward's part for format; null where there is none"]
    digest: Annotated[
        str, "of all answers, of log-probabilities of all rewards: equal where all are identical, 16 hex digits"
    ]
    tokens: Annotated[int, "generated; none for log-probabilities"]
    failed: Annotated[int, "answers whose scoring failed"]
    error: Annotated[str | None, "the first of them, and why"]
    seconds_generate: Annotated[float, "in generating, or in reading answers for log-probabilities"]
    seconds_score: Annotated[float, "in scoring"]


def meanings(kind: type) -> dict[str, str]:
    """Of each field of one of these types what it means."""
    return {name: get_args(hint)[1] for name, hint in get_type_hints(kind, include_extras=True).items()}


_FEW = 8  # questions: with fewer an interval is too narrow to rest a warning on (at 8 by 17 %)


def member_line(generation: int, member: int, evaluation: Evaluation) -> Row:
    """What the journal keeps of a member: all that the generation's update and metrics need."""
    error = evaluation.error
    return {
        "generation": generation,
        "member": member,
        "rewards": evaluation.rewards,
        "exact": evaluation.mean("exact"),
        "format": evaluation.mean("format"),
        "digest": evaluation.digest,
        "tokens": evaluation.tokens,
        "failed": evaluation.failed,
        "error": None if error is None else f"prompt {error[0]}: {error[1]}",
        "seconds_generate": evaluation.seconds_generate,
        "seconds_score": evaluation.seconds_score,
    }


def population_row(
    members: Sequence[Row], by_prompt: Sequence[Sequence[float]], seconds: float, workers: int, samples: int = 1
) -> dict[str, Any]:
    """The part of a row of metrics.jsonl that the members' lines and rewards [member][prompt] give; `seconds`: of the
    whole generation, of which each of the workers had as many; `samples`: answers to each prompt."""
    means = [math.fsum(rewards) / len(rewards) for rewards in by_prompt]
    mean = math.fsum(means) / len(means)
    generating, scoring = (
        math.fsum(member[key] for member in members) for key in ("seconds_generate", "seconds_score")
    )
    tokens = sum(member["tokens"] for member in members)
    return {
        "reward_mean": mean,
        "reward_std": math.sqrt(math.fsum((reward - mean) ** 2 for reward in means) / len(means)),
        "reward_min": min(means),
        "reward_max": max(means),
        **_quantiles("reward", means, 25, 50, 75),
        **_reward_interval([math.fsum(rewards) / len(rewards) for rewards in zip(*by_prompt, strict=True)]),
        "exact_mean": mean_of_known([member["exact"] for member in members]),
        "format_mean": mean_of_known([member["format"] for member in members]),
        "seconds": seconds,
        "seconds_generate": generating,
        "seconds_score": scoring,
        "workers": workers,
        "share_outside": max(0.0, 1 - (generating + scoring) / (seconds * workers)),
        "tokens": tokens,
        "answer_tokens": tokens / (samples * sum(map(len, by_prompt))) if tokens else None,
        "tokens_per_second": tokens * workers / generating if generating else 0.0,
        "identical": share_identical([member["digest"] for member in members]),
        "failed": sum(member["failed"] for member in members),
        "failed_example": next((member["error"] for member in members if member["error"] is not None), None),
    }


def _quantiles(name: str, values: Sequence[float], *percent: int) -> Row:
    """Those of the values, between two of them in proportion."""
    return {f"{name}_q{p}": float(at) for p, at in zip(percent, numpy.percentile(values, percent), strict=True)}


def _reward_interval(rewards: Sequence[float]) -> Row:
    """95 % interval of their mean, given one reward for each question; None with fewer than _FEW."""
    low, high = interval(rewards) if len(rewards) >= _FEW else (None, None)
    return {"reward_low": low, "reward_high": high}


def eval_row(task: Task, evaluation: Evaluation, done: int, seconds: float) -> Row:
    """A row of evals.jsonl: what the held-out answers are worth after `done` updates, with the headline metric's 95 %
    interval."""
    values, rewards = headline(task, evaluation.scores), rewards_of(task, evaluation.scores)
    low, high = interval(values)
    lengths = [len(answer.ids) for answer in evaluation.answers]
    return {
        "generation": done,
        "items": len(values),
        "reward": math.fsum(rewards) / len(rewards),
        **_reward_interval(rewards),
        "exact": evaluation.mean("exact"),
        "format": evaluation.mean("format"),
        "failed": evaluation.failed,
        "answer_tokens": sum(lengths) / len(lengths),
        **_quantiles("answer_tokens", lengths, 10, 90),
        task.metric: math.fsum(values) / len(values),
        "low": low,
        "high": high,
        "seconds": seconds,
    }


def worker_seconds(row: Mapping[str, Any]) -> float:
    """Of a generation, summed over the workers as the seconds of its parts are."""
    return row["seconds"] * row.get("workers", 1)


def summary(metric: str, rows: Sequence[Mapping[str, Any]], evals: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the rows come to. Unknown is None: the base model's part, if the first eval was lost, and shares of no time
    at all."""
    last = evals[-1]
    first = next((row for row in evals if row["generation"] == 0), {metric: None, "low": None, "high": None})
    seconds = {
        f"seconds{part}": math.fsum(row[f"seconds{part}"] for row in rows)
        for part in ("", "_generate", "_score", "_kernels")
    }
    del seconds["seconds"]
    training = math.fsum(worker_seconds(row) for row in rows)
    return {
        "metric": metric,
        "base": first[metric],
        "base_interval": [first["low"], first["high"]],
        "final": last[metric],
        "final_interval": [last["low"], last["high"]],
        "held_out": last["items"],
        "held_out_curve": [[row["generation"], row[metric]] for row in evals],
        "seconds_total": total_seconds(rows, evals),
        **seconds,
        "share_outside": 1 - (seconds["seconds_generate"] + seconds["seconds_score"]) / training if training else None,
        "tokens": sum(row["tokens"] for row in rows),
    }


def total_seconds(rows: Sequence[Mapping[str, Any]], evals: Sequence[Mapping[str, Any]]) -> float:
    return math.fsum([*(row["seconds"] for row in rows), *(row["seconds"] for row in evals)])
