"""What a generation did, as one value: from the rewards of its members, to the log and over every wire."""

from __future__ import annotations

import base64
import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from es_finetune.errors import UserError
from es_finetune.optim.options import finite, whole
from es_finetune.optim.shaping import MAX_REWARD, SHAPINGS


class Update(NamedTuple):
    """What one generation did; with the param_groups' options of then it is all that `replay` needs."""

    generation: int  # counted from 0
    z: tuple[float, ...] | None  # f32, one per member, 0 if dropped; None: no signal, so nothing was changed
    scored: int  # how many members were not dropped
    reward: float  # their mean; with shaping="per_prompt" the mean of their means over the prompts
    dropped: tuple[int, ...] = ()  # members that were given up, in order

    def to_json(self) -> dict[str, Any]:
        """The update as plain JSON.

        Returns:
            The fields by name: z as base64 of little-endian f32, `dropped` only where a member was.
        """
        z = None if self.z is None else base64.b64encode(np.array(self.z, "<f4").tobytes()).decode()
        line = {"generation": self.generation, "z": z, "scored": self.scored, "reward": self.reward}
        return {**line, "dropped": list(self.dropped)} if self.dropped else line

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> Update:
        """The update that `to_json` was called on.

        Args:
            line: What that returned. Other keys in it are left alone.

        Returns:
            An equal update.

        Raises:
            KeyError, TypeError, ValueError: It returned no such thing.
        """
        z = line["z"]
        if z is not None:
            z = tuple(np.frombuffer(base64.b64decode(z), "<f4").astype(float).tolist())
        generation, scored = (whole(name, line[name]) for name in ("generation", "scored"))
        dropped = tuple(whole("dropped", member) for member in line.get("dropped", ()))
        return cls(generation, z, scored, finite("reward", line["reward"]), dropped)


def make_update(
    generation: int,
    fitness: Sequence,
    dropped: Collection[int] = (),
    *,
    population: int,
    shaping: str,
    antithetic: bool,
) -> Update:
    """What `EvolutionStrategy.tell` would do with these rewards, without any weights.

    For who hands the update to several workers, each of which will `apply` it.

    Args:
        generation: The number of the generation, from 0.
        fitness: One reward per member, in member order; with shaping="per_prompt" one sequence of rewards per member.
        dropped: Members without a reward. With `antithetic` their partners count as dropped too.
        population: How many members there are.
        shaping: A key of `shaping.SHAPINGS`.
        antithetic: Whether members 2k and 2k + 1 are a pair.

    Returns:
        The update, whose `dropped` are the members named here.

    Raises:
        UserError: For a reward that is not finite or beyond 1e100, for members that are none, and where all are
            dropped.
    """
    if len(fitness) != population:
        raise UserError(f"tell() needs {population} rewards, one per member, and got {len(fitness)}")
    out = set(dropped)
    if not out <= set(range(population)):
        raise UserError(f"dropped members must be in 0..{population - 1}, not {sorted(out - set(range(population)))}")
    if antithetic:
        out |= {member ^ 1 for member in out}
    if len(out) == population:
        raise UserError("every member was dropped: there is nothing to learn from")
    rewards = [
        None if member in out else checked_reward(reward, member, shaping) for member, reward in enumerate(fitness)
    ]
    scored = [
        math.fsum(reward) / len(reward) if isinstance(reward, list) else reward
        for reward in rewards
        if reward is not None
    ]
    mean = math.fsum(scored) / len(scored)
    return Update(generation, SHAPINGS[shaping](rewards), len(scored), mean, tuple(sorted(set(dropped))))


def checked_reward(reward: Any, member: int, shaping: str) -> float | list[float]:
    """A member's reward as the shaping takes it: one number of at most 1e100, or with "per_prompt" a list of them.

    Raises:
        UserError: For anything else.
    """
    if shaping != "per_prompt":
        return _finite(reward, member)
    is_sequence = getattr(reward, "ndim", 0) == 1 or (
        isinstance(reward, Sequence) and not isinstance(reward, (str, bytes))
    )
    if not is_sequence or not len(reward):
        raise UserError(
            f'with shaping="per_prompt" the reward of member {member} must be a sequence, one number per prompt, not '
            f"{reward!r}"
        )
    return [_finite(of_prompt, member) for of_prompt in reward]


def _finite(reward: Any, member: int) -> float:
    try:
        value = float(reward)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last: a tensor of several elements
        raise UserError(f"the reward of member {member} must be one number, not {reward!r}") from None
    if not abs(value) <= MAX_REWARD:
        problem = (
            "a member that failed must be declared dropped"
            if not math.isfinite(value)
            else f"its size must be at most {MAX_REWARD:g}"
        )
        raise UserError(f"the reward of member {member} is {value}; {problem}")
    return value
