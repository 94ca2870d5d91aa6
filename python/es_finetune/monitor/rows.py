"""What a run measures of itself: lines of the journal, rows of metrics.jsonl and evals.jsonl, summary.json. Plain
numbers, seconds and bytes."""

from __future__ import annotations

import math
import resource
from collections.abc import Sequence
from typing import Any

import torch

from es_finetune.evaluation.evaluator import Evaluation, floor_of, headline, rewards_of
from es_finetune.evaluation.statistics import interval, mean_of_known, share_identical
from es_finetune.tasks import Task

Row = dict[str, Any]

_FEW = 8  # questions: with fewer an interval is too narrow to rest a warning on (at 8 by 17 %)


def member_line(generation: int, member: int, evaluation: Evaluation) -> Row:
    """What the journal keeps of a member: all that the generation's update and metrics need."""
    error = evaluation.error
    return {
        "generation": generation,
        "member": member,
        "rewards": [score.reward for score in evaluation.scores],
        "exact": evaluation.mean("exact"),
        "format": evaluation.mean("format"),
        "digest": evaluation.digest,
        "tokens": evaluation.tokens,
        "failed": evaluation.failed,
        "error": None if error is None else f"prompt {error[0]}: {error[1]}",
        "seconds_generate": evaluation.seconds_generate,
        "seconds_score": evaluation.seconds_score,
    }


def rewards_by_prompt(task: Task, members: Sequence[Row]) -> list[list[float]]:
    """[member][prompt]; of an answer whose scoring failed the floor among the whole generation's."""
    floor = floor_of(task, (reward for member in members for reward in member["rewards"]))
    return [[floor if reward is None else reward for reward in member["rewards"]] for member in members]


def population_row(members: Sequence[Row], by_prompt: Sequence[Sequence[float]], seconds: float, workers: int) -> Row:
    """The part of a row of metrics.jsonl that the members' lines and rewards [member][prompt] give; `seconds`: of the
    whole generation, of which each of the workers had as many."""
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
        **_reward_interval([math.fsum(rewards) / len(rewards) for rewards in zip(*by_prompt)]),
        "exact_mean": mean_of_known([member["exact"] for member in members]),
        "format_mean": mean_of_known([member["format"] for member in members]),
        "seconds": seconds,
        "seconds_generate": generating,
        "seconds_score": scoring,
        "workers": workers,
        "share_outside": max(0.0, 1 - (generating + scoring) / (seconds * workers)),
        "tokens": tokens,
        "tokens_per_second": tokens * workers / generating if generating else 0.0,
        "identical": share_identical([member["digest"] for member in members]),
        "failed": sum(member["failed"] for member in members),
        "failed_example": next((member["error"] for member in members if member["error"] is not None), None),
    }


def _reward_interval(rewards: Sequence[float]) -> Row:
    """95 % interval of their mean, given one reward for each question; None with fewer than _FEW."""
    low, high = interval(rewards) if len(rewards) >= _FEW else (None, None)
    return {"reward_low": low, "reward_high": high}


def eval_row(task: Task, evaluation: Evaluation, done: int, seconds: float) -> Row:
    """A row of evals.jsonl: what the held-out answers are worth after `done` updates, with the headline metric's 95 %
    interval."""
    values, rewards = headline(task, evaluation.scores), rewards_of(task, evaluation.scores)
    low, high = interval(values)
    return {
        "generation": done,
        "items": len(values),
        "reward": math.fsum(rewards) / len(rewards),
        **_reward_interval(rewards),
        "exact": evaluation.mean("exact"),
        "format": evaluation.mean("format"),
        "failed": evaluation.failed,
        task.metric: math.fsum(values) / len(values),
        "low": low,
        "high": high,
        "seconds": seconds,
    }


def summary(metric: str, rows: Sequence[Row], evals: Sequence[Row]) -> Row:
    """What the rows come to. Unknown is None: the base model's part, if the first eval was lost, and shares of no time
    at all."""
    last = evals[-1]
    first = next((row for row in evals if row["generation"] == 0), {metric: None, "low": None, "high": None})
    seconds = {
        f"seconds{part}": math.fsum(row[f"seconds{part}"] for row in rows)
        for part in ("", "_generate", "_score", "_kernels")
    }
    del seconds["seconds"]
    training = math.fsum(row["seconds"] * row["workers"] for row in rows)
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


def total_seconds(rows: Sequence[Row], evals: Sequence[Row]) -> float:
    return math.fsum([*(row["seconds"] for row in rows), *(row["seconds"] for row in evals)])


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's allocator, or of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
