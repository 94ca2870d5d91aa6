"""`es-finetune calibrate`: which sigma suits a model and a task. A few members at each of a row of sigmas, and what
became of their reward."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Iterable, Sequence
from statistics import stdev
from typing import Any

from es_finetune.commands import takes_options_of
from es_finetune.config import CalibrateConfig, model_options
from es_finetune.errors import UserError
from es_finetune.evaluation.evaluator import Evaluation, Evaluator, LogProbEvaluator, rewards_of
from es_finetune.evaluation.statistics import share_identical
from es_finetune.models.checkpoint_names import named_segments
from es_finetune.models.load import load_model, pick_device
from es_finetune.monitor.advice import is_norm
from es_finetune.monitor.health import Health
from es_finetune.optim.evolution_strategy import EvolutionStrategy
from es_finetune.runs.setup import given_task, make_engine, make_task
from es_finetune.tasks import Data, Reward, reads

logger = logging.getLogger(__name__)

PROMPTS = 64

# Share of the reward that noise may cost. On the embedded model (lr = sigma, 30 generations, 3 seeds) sigma 0.005 /
# 0.01 / 0.014 / 0.02 / 0.03 comes to 50 / 86 / 84 / 80 / 68 % exact, and this limit finds 0.007 to 0.014 for five
# choices of noise and prompts. The spread of the members as a limit put it a factor of 3 apart.
_BEARABLE = 0.1
_COLLAPSED = 0.5  # no larger sigma needs to be tried
_CERTAIN = 2  # standard errors from which a loss is one
# Successes of the base model from which a loss can be told: with one of 29 prompts right, losing that one looked like
# losing all, and sigma came out at a tenth of where the signal peaked.
_SUCCESSES = 5


@takes_options_of(CalibrateConfig)
def calibrate(
    config: CalibrateConfig, *, data: Data | None = None, test_data: Data | None = None, reward: Reward | None = None
) -> dict[str, Any]:
    """Find a sigma for a model and a task from a few members.

    Tries the sigmas, smallest first, until two in a row do harm and the reward has fallen by half. Every member answers
    the same prompts, and has the same noise, scaled, at every sigma. A table of what each sigma does goes to `logging`,
    row by row.

    Args:
        **options: The flags of `es-finetune calibrate`, which are the fields of `CalibrateConfig`. With task "custom"
            `data`, `test_data` and `reward` may be objects as for `Trainer`.

    Returns:
        "sigma", the one to use, or None, "lr", half of it, and "reason", one sentence; "base_reward", and in "sigmas"
        the rows of `measure_sigma`; "task" and "model".

    Raises:
        UserError: Model, task or number of prompts cannot be had, before any answer is generated; or the base model's
            answers earn too little to tell what noise costs.
    """
    task = given_task(config, data=data, test_data=test_data, reward=reward) or make_task(config)
    items = list(task.train)
    count = min(PROMPTS, len(items)) if config.prompts is None else config.prompts or len(items)
    if count > len(items):
        raise UserError(f"prompts must be at most {len(items)}, the training prompts of {config.task}, not {count}")
    model, tokenizer, _ = load_model(config.model, device=pick_device(config.device), **model_options(config))
    asked = random.Random(config.seed).sample(items, count)
    kind = LogProbEvaluator if reads(task) else Evaluator
    evaluator = kind(make_engine(config, task, model, tokenizer), task, asked)
    # theta is never updated, so a copy in storage precision is exact.
    optimizer = EvolutionStrategy(
        named_segments(model),
        noise_rank=config.noise_rank,
        population=config.members,
        seed=config.seed,
        antithetic=True,
        master="copy",
    )
    health = Health(optimizer)

    logger.info(f"{config.task}, {config.model}: {config.members} members, {count} prompts")
    base = evaluator()
    if (failure := base.error) is not None:
        if base.all_failed:
            raise UserError(f"no answer could be scored; the first failure: {failure[1]}")
        logger.warning(
            f"scoring failed for {base.failed} of {len(base.scores)} answers of the base model; the first: {failure[1]}"
        )
    base_rewards = rewards_of(task, base.scores)
    refuse_too_few(base_rewards)
    base_reward = math.fsum(base_rewards) / count
    logger.info(_LEGEND)
    logger.info(_line(_COLUMNS))
    logger.info(_line(["0", f"{base_reward:.3g}"]))
    rows: list[dict[str, Any]] = []
    for sigma in config.sigmas:
        rows.append(measure_sigma(sigma, base_rewards, optimizer, evaluator, health))
        logger.info(_line(_cells(rows[-1])))
        before, now = [0.0, *(_harm(row, base_reward) for row in rows[-2:])][-2:]
        if before > 1 and now > _COLLAPSED / _BEARABLE:
            break
    best, reason = recommend(base_reward, rows)
    return {
        "task": config.task,
        "model": config.model,
        "base_reward": base_reward,
        "sigmas": rows,
        "sigma": best,
        "lr": None if best is None else best / 2,
        "reason": reason,
    }


def refuse_too_few(rewards: Sequence[float]) -> None:
    """UserError unless the base model's rewards hold as much as _SUCCESSES answers: its right ones, where there are
    two rewards only, else what the rewards have above the lowest of them, in units of the highest. Of fewer prompts
    with graded rewards, as conciseness has, nothing is asked: the least error, one answer, says what they can tell."""
    if len(rewards) < _SUCCESSES and not set(rewards) <= {0, 1}:
        return
    low, high = min(rewards), max(rewards)
    held = math.fsum((reward - low) / (high - low) for reward in rewards) if high > low else len(rewards) if high else 0
    if held < _SUCCESSES:
        graded = len(set(rewards)) > 2
        what = (
            f"earns on {len(rewards)} prompts as much as {held:.1f} of its best answers"
            if graded
            else f"succeeds at {held:.0f} of {len(rewards)} prompts"
        )
        raise UserError(
            f"the base model {what}, too little to tell from chance what noise costs, which takes {_SUCCESSES}: "
            "use more or easier prompts, or a reward that also pays for a part"
        )


def measure_sigma(
    sigma: float, base_rewards: Sequence[float], optimizer: EvolutionStrategy, evaluator: Evaluator, health: Health
) -> dict[str, Any]:
    """What this sigma does to the reward.

    Returns:
        With R+ and R- of a pair:

        - reward, lost: mean over the members; the base model's - that; and its standard error: over pairs, in which the
          slope cancels, but at least one answer's worth, (highest - lowest reward) / prompts, since a few members that
          fail alike have no spread
        - spread: standard deviation of the members' rewards (ddof 1), and its standard error if they are normal
        - signal: rms of (R+ - R-) / 2, what a step can follow
        - damage: rms of (R+ + R-) / 2 - the base model's, what both directions do alike
        - identical: share of members with the very answers of another
        - swallowed: how many tensors have a correlation of realised with intended noise under 0.9
        - norms: how many norm weights have
        - correlation: [tensor, correlation] of the lowest of the swallowed, or without any of all tensors, or None
    """
    begin = time.perf_counter()
    for group in optimizer.param_groups:
        group["sigma"] = sigma
    arrived: dict[str, Any] = {}

    def answer(member: int) -> Evaluation:
        if member == 0:
            arrived.update(health.measure_member())
        return evaluator()

    members = optimizer.evaluate(answer)
    rewards = [rewards_of(evaluator.task, member.scores) for member in members]
    base_reward, *means = (math.fsum(of) / len(of) for of in (base_rewards, *rewards))
    every = [reward for of in (base_rewards, *rewards) for reward in of]
    an_answer = (max(every) - min(every)) / len(base_rewards)
    odd = [(plus - minus) / 2 for plus, minus in zip(means[::2], means[1::2], strict=True)]
    even = [(plus + minus) / 2 - base_reward for plus, minus in zip(means[::2], means[1::2], strict=True)]
    mean, spread = math.fsum(means) / len(means), stdev(means)
    low = {name: correlation for name, (correlation, _) in arrived["correlation"].items() if not is_norm(name)}
    worst = min(low, key=lambda name: low[name], default=None)
    return {
        "sigma": sigma,
        "reward": mean,
        "lost": base_reward - mean,
        "lost_error": max(stdev(even) / math.sqrt(len(even)), an_answer),
        "spread": spread,
        "spread_error": spread / math.sqrt(2 * (len(means) - 1)),
        "signal": _rms(odd),
        "damage": _rms(even),
        "identical": share_identical([member.digest for member in members]),
        "correlation": arrived["correlation_min"] if worst is None else [worst, low[worst]],
        "swallowed": len(low),
        "norms": len(arrived["correlation"]) - len(low),
        "seconds": time.perf_counter() - begin,
    }


def recommend(base_reward: float, rows: Sequence[dict[str, Any]]) -> tuple[float | None, str]:
    """(sigma or None, why), from the rows of `measure_sigma`, smallest sigma first.

    The largest sigma at which members lose no more than a tenth of the base reward, or no more than chance explains:
    noise has to be felt, since the step is as large as it, and not to break what it explores. A sigma that does harm is
    believed where the next one does too, or none was tried beyond it. Between two sigmas it is interpolated, on
    logarithmic scales.
    """
    if not any(row["spread"] for row in rows):
        gets = "never gets a reward" if base_reward == 0 else f"gets {base_reward:.4g} whatever the noise"
        remedy = "use more or easier prompts, a reward that also pays for a part, or larger sigmas"
        return None, f"no sigma can be told from another: the model {gets}; {remedy}"
    harm = [_harm(row, base_reward) for row in rows]
    beyond = next(
        (place for place, two in enumerate(zip(harm, [*harm[1:], math.inf], strict=True)) if min(two) > 1), None
    )
    if beyond == 0:
        return (
            None,
            f"even sigma {rows[0]['sigma']:g} costs {rows[0]['lost']:.3g} of a reward of {base_reward:.3g}: try "
            "smaller ones with --sigmas",
        )
    bearable = rows[:beyond]
    loudest = max(bearable, key=lambda row: row["spread"])
    if not loudest["spread"]:
        assert beyond is not None  # some row has a spread
        between = f"up to {bearable[-1]['sigma']:g} all members score the same, and {rows[beyond]['sigma']:g} harms"
        return None, f"no sigma serves: {between}; use more prompts, or sigmas between these"
    # The model no longer answers, which costs nothing where the base gets nothing
    if bearable[-1]["spread"] < loudest["spread"] / 2:
        sigma, reason = loudest["sigma"], "members differ most there, and beyond they all fail"
    elif beyond is None:
        sigma, reason = (
            bearable[-1]["sigma"],
            "the largest one tried, and it does no harm yet: a larger one may learn faster",
        )
    else:
        below, above = (_cost(row, base_reward) for row in rows[beyond - 1 : beyond + 1])
        place = math.log(1 / below) / math.log(above / below) if below > 0 else 0.5
        low, high = rows[beyond - 1]["sigma"], rows[beyond]["sigma"]
        sigma = float(f"{low * (high / low) ** max(0.0, min(1.0, place)):.2g}")
        costs = f"{rows[beyond]['lost'] / abs(base_reward):.0%}"
        reason = f"the largest one that costs members no more than a tenth of the reward; {high:g} costs {costs}"
    nearest = min(rows, key=lambda row: abs(math.log(row["sigma"] / sigma)))
    if nearest["swallowed"]:
        name, correlation = nearest["correlation"]
        reason += f". In {nearest['swallowed']} tensor(s) the dtype swallows part of the noise "
        reason += f"({name}: correlation {correlation:.2f}): "
        reason += "give them a larger sigma with --sigma_for, or float32 with --dtype, or --freeze them"
    return sigma, reason


def _harm(row: dict[str, Any], base_reward: float) -> float:
    """What its members certainly lose, in units of what they may lose; 0 where the base reward is 0 or they lose
    nothing."""
    certain = base_reward and row["lost"] > max(0.0, _CERTAIN * row["lost_error"])
    return _cost(row, base_reward) if certain else 0.0


def _cost(row: dict[str, Any], base_reward: float) -> float:
    return row["lost"] / (_BEARABLE * abs(base_reward))


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values) / len(values))


# And their widths: 79 in all
_COLUMNS = {"sigma": 8, "reward": 9, "lost": 16, "spread": 7, "signal": 7, "alike": 5, "noise": 13, "seconds": 7}
_LEGEND = """reward: mean of the members; at sigma 0, of the model as it is
lost: what noise costs, ± its standard error, at least one answer's worth
spread: standard deviation between members
signal: half the difference between opposite noise, which a step can follow
alike: share of members that answer every prompt as another member does
noise: correlation with the intended one, where lowest; in bf16 norms lose some"""


def _line(cells: Iterable[str]) -> str:
    return " ".join(cell.rjust(width) for cell, width in zip(cells, _COLUMNS.values(), strict=False))


def _cells(row: dict[str, Any]) -> list[str]:
    note = f" ({row['swallowed']} low)" if row["swallowed"] else " (norms)" if row["norms"] else ""
    return [
        f"{row['sigma']:.3g}",
        f"{row['reward']:.3g}",
        f"{row['lost']:.2g} ± {row['lost_error']:.1g}",
        f"{row['spread']:.2g}",
        f"{row['signal']:.2g}",
        f"{row['identical']:.0%}",
        "-" if row["correlation"] is None else f"{row['correlation'][1]:.2f}{note}",
        f"{row['seconds']:.1f}",
    ]
