"""From the rewards of a generation to Z, what each member's noise counts in the update.

Whatever the shaping, the Z of scored members have mean 0 and standard deviation 1 (ddof 0), so that another shaping
leaves the meaning of lr alone.

Computed in f64 by operations that IEEE 754 defines exactly (and exactly rounded sums), cast to f32 once: the same bits
on every machine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from es_finetune.errors import UserError

MAX_REWARD = 1e100  # sums of squares of rewards are finite; tasks.sandbox has the same limit
# Sums of z-scores that should cancel leave about 1e-16 * prompts; divided by their own std it would make a step of full
# size.
_ROUNDING = 1e-9


def z_scores(rewards: Sequence[float | None]) -> tuple[float, ...] | None:
    """(R - mean R) / std R.

    Args:
        rewards: One f64 per member, of at most MAX_REWARD in size; None for a dropped member. At least one is not None.

    Returns:
        One f32 value per member, 0 for a dropped one. None if all rewards are equal: there is no signal.
    """
    return _spread(rewards, _standardized([reward for reward in rewards if reward is not None]))


def centred_ranks(rewards: Sequence[float | None]) -> tuple[float, ...] | None:
    """The centred ranks of Salimans et al. (arXiv:1703.03864), ties sharing their mean rank, divided by their std.

    They run from -0.5 to 0.5 there, with std 0.30 for N = 30: a third of the step. Here (rank - mean) / std, in which
    the scale of the ranks plays no part.

    Args:
        rewards: As for `z_scores`.

    Returns:
        One f32 value per member, 0 for a dropped one. None if all rewards are equal: there is no signal.
    """
    ordered = sorted(reward for reward in rewards if reward is not None)
    mean_rank: dict[float, float] = {}
    first = 0
    for reward, group in itertools.groupby(ordered):
        ties = len(list(group))
        mean_rank[reward] = first + (ties - 1) / 2
        first += ties
    return z_scores([None if reward is None else mean_rank[reward] for reward in rewards])


def per_prompt(rewards: Sequence[Sequence[float] | None]) -> tuple[float, ...] | None:
    """z-scores over the members for each prompt alone, their mean over the prompts, and the z-scores of that.

    A prompt on which all members are equal says nothing about them and is left out. Each of the others counts the same,
    however large its rewards.

    Args:
        rewards: For each member one f64 per prompt, prompts in the same order, of at most MAX_REWARD in size; None for
            a dropped member. At least one is not None.

    Returns:
        One f32 value per member, 0 for a dropped one. None if no prompt is left, or if they cancel: there is no signal.

    Raises:
        UserError: Members have different numbers of rewards.
    """
    scored = {member: reward for member, reward in enumerate(rewards) if reward is not None}
    prompts = {len(reward): member for member, reward in scored.items()}
    if len(prompts) > 1:
        (one, a), (other, b) = list(prompts.items())[:2]
        raise UserError(
            f"member {a} has {one} rewards and member {b} has {other}: all members need one for each of the same "
            "prompts"
        )
    columns = [z for z in map(_standardized, zip(*scored.values(), strict=True)) if z is not None]
    means = [math.fsum(of_member) / len(columns) for of_member in zip(*columns, strict=True)]
    if not means or max(means) - min(means) < _ROUNDING:
        return None
    return _spread(rewards, _standardized(means))


SHAPINGS: dict[str, Callable[[Sequence], tuple[float, ...] | None]] = {
    "zscore": z_scores,
    "ranks": centred_ranks,
    "per_prompt": per_prompt,
}


def _standardized(values: Sequence[float]) -> list[float] | None:
    """(value - mean) / std in f64, ddof 0; None if all are equal. That is asked of the values and not of std: thirty
    times 0.015 has std 1.7e-18."""
    if max(values) == min(values):
        return None
    mean = math.fsum(values) / len(values)
    # A power of two in the way changes no bit, and squares neither overflow nor vanish.
    exponent = math.frexp(max(abs(value - mean) for value in values))[1]
    centred = [math.ldexp(value - mean, -exponent) for value in values]
    std = math.sqrt(math.fsum(c * c for c in centred) / len(centred))  # not c**2: pow() is not exactly rounded
    return [c / std for c in centred]


def _spread(rewards: Sequence, z: Sequence[float] | None) -> tuple[float, ...] | None:
    """The values of the scored members put at their places, as f32, and 0 at the others."""
    if z is None:
        return None
    values = iter(z)
    return tuple(0.0 if reward is None else float(np.float32(next(values))) for reward in rewards)
