"""What the options of EvolutionStrategy must be, and what a number must be wherever it is given. Each function returns
plain Python values; UserError, by name, for anything else. Imports neither NumPy nor torch: they would take most of the
time in which a command line is checked."""

from __future__ import annotations

import ctypes
import math
import operator
from typing import Any

from es_finetune.errors import UserError

MAX_RANK = 64  # es_kernels.low_rank.MAX_RANK
COUNT = 2**32 - 1  # members and generations are 32-bit words of the counter that member seeds come from

MASTERS = ("fp32", "copy", "host", None)
SHAPINGS = ("zscore", "ranks", "per_prompt")
ROUNDINGS = ("nearest", "stochastic")


def check_options(
    *,
    population: Any,
    seed: Any,
    master: Any,
    antithetic: bool,
    shaping: Any,
    momentum: Any,
    momentum_window: Any,
    perturb_rounding: Any,
    update_rounding: Any,
) -> dict[str, Any]:
    """The options of a whole run, checked before there is an optimizer.

    Args:
        population, seed, ...: As EvolutionStrategy takes them.

    Returns:
        The same options by name, as plain values; an `update_rounding` of None is replaced by its default.

    Raises:
        UserError: An option has a value that it cannot have, or not together with another.
    """
    if master not in MASTERS:
        raise UserError(f'master must be "fp32", "copy", "host" or None, not {master!r}')
    if shaping not in SHAPINGS:
        raise UserError(f'shaping must be "zscore", "ranks" or "per_prompt", not {shaping!r}')
    momentum = finite("momentum", momentum)
    if not 0 <= momentum < 1:
        raise UserError(f"momentum must be at least 0 and less than 1, not {momentum}")
    momentum_window = whole("momentum_window, which counts the present generation,", momentum_window, 1)
    if update_rounding is None:
        update_rounding = "stochastic" if master in ("copy", None) else "nearest"
    for option, rounding in (("perturb_rounding", perturb_rounding), ("update_rounding", update_rounding)):
        if rounding not in ROUNDINGS:
            raise UserError(f'{option} must be "nearest" or "stochastic", not {rounding!r}')
    if master is None and perturb_rounding != "nearest":
        raise UserError(
            'perturb_rounding="stochastic" needs weights to return to: choose master="fp32", "copy" or "host"'
        )
    population = whole("population", population, 2, COUNT)  # one reward alone has no direction
    if antithetic and population % 2:
        raise UserError(f"antithetic members come in pairs: population must be even, not {population}")
    return {
        "population": population,
        "seed": seed64("seed", seed),
        "master": master,
        "antithetic": antithetic,
        "shaping": shaping,
        "momentum": momentum,
        "momentum_window": momentum_window,
        "perturb_rounding": perturb_rounding,
        "update_rounding": update_rounding,
    }


def check_group(*, sigma: Any, lr: Any, weight_decay: Any, noise_rank: Any) -> dict[str, float]:
    """The numbers of one param_group.

    Returns:
        The same numbers by name, noise_rank as an int, the others as floats.

    Raises:
        UserError: One is not a number that float32 holds, sigma is not positive, another is negative, or noise_rank is
            no whole number up to MAX_RANK.
    """
    numbers: dict[str, float] = {
        "sigma": f32_positive("sigma", sigma),
        "lr": f32_or_zero("lr", lr),
        "weight_decay": f32_or_zero("weight_decay", weight_decay),
    }
    if numbers["lr"] and numbers["weight_decay"]:
        f32_positive("the decay, lr * weight_decay,", numbers["lr"] * numbers["weight_decay"])
    return {**numbers, "noise_rank": noise_rank_of(noise_rank)}


def noise_rank_of(value: Any) -> int:
    """A rank of the noise, or 0 for full noise."""
    return whole("noise_rank", value, 0, MAX_RANK)


def whole(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """An int, or an integer of NumPy or torch; no bool, and no float though it be whole."""
    try:
        if is_bool(value):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise UserError(f"{name} must be a whole number, not {value!r}") from None
    if least is not None and number < least:
        raise UserError(f"{name} must be at least {least}, not {number}")
    if most is not None and number > most:
        raise UserError(f"{name} must be at most {most}, not {number}")
    return number


def seed64(name: str, value: Any) -> int:
    """A whole number of 64 bits, signed or unsigned."""
    number = whole(name, value)
    if not -(2**63) <= number < 2**64:
        raise UserError(f"{name} must be a whole number of 64 bits, at most 2^64 - 1, not {number}")
    return number


def finite(name: str, value: Any) -> float:
    """Any real number but NaN and the infinities; no bool and no text."""
    try:
        if is_bool(value) or isinstance(value, (str, bytes)):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last: a tensor of several elements
        raise UserError(f"{name} must be a number, not {value!r}") from None
    if not math.isfinite(number):
        raise UserError(f"{name} must be a finite number, not {number}")
    return number


def f32_positive(name: str, value: Any) -> float:
    """A positive number that is one in float32 too, in which the kernels compute: neither 0 nor infinite."""
    number = finite(name, value)
    if number <= 0:
        raise UserError(f"{name} must be a positive number, not {number}")
    if not 0 < as_f32(number) < math.inf:
        raise UserError(f"{name} must be a number that float32 holds, 1.4e-45 to 3.4e38, not {number}")
    return number


def f32_or_zero(name: str, value: Any) -> float:
    """0, or as `f32_positive`."""
    number = finite(name, value)
    if number < 0:
        raise UserError(f"{name} must be a number >= 0, not {number}")
    return f32_positive(name, number) if number else 0.0


def as_f32(number: float) -> float:
    """The nearest float32; beyond the largest of them an infinity."""
    return ctypes.c_float(number).value


def is_bool(value: Any) -> bool:
    """Whether it is a bool, Python's or NumPy's."""
    return isinstance(value, bool) or getattr(getattr(value, "dtype", None), "kind", "") == "b"
