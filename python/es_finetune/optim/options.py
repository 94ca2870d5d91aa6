"""What a number must be, wherever it is given: an argument of EvolutionStrategy or an option of a config. Each function
returns the plain Python number; ValueError, by name, for anything else. Imports neither NumPy nor torch: they would
take most of the time in which a command line is checked."""

from __future__ import annotations

import ctypes
import math
import operator
from typing import Any

from es_finetune.errors import UserError

COUNT = 2**32 - 1  # members and generations are 32-bit words of the counter that member seeds come from


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
