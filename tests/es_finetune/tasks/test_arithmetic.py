"""Contract under test: arithmetic is exact, and bounded before it starts (es_finetune.tasks.arithmetic)."""

from fractions import Fraction

import pytest

from es_finetune.tasks.arithmetic import MAX_DEPTH, MAX_LENGTH, evaluate


@pytest.mark.parametrize(
    "text, value, numbers",
    [
        ("3+4+7", 14, [3, 4, 7]),
        (" ( 1 + 2 ) / 3 ", 1, [1, 2, 3]),
        ("1/3*3", 1, [1, 3, 3]),
        ("2-3-4", -5, [2, 3, 4]),
        ("8/2/2", 2, [8, 2, 2]),
        ("2+3*4", 14, [2, 3, 4]),
        ("-(2-5)", 3, [2, 5]),
        ("1/3+1/6", Fraction(1, 2), [1, 3, 1, 6]),
        ("0", 0, [0]),
    ],
)
def test_arithmetic_is_exact(text, value, numbers):
    assert evaluate(text) == (value, numbers)


def test_arithmetic_refuses_what_is_none(hostile, within):
    with within(3):
        assert evaluate(hostile) is None


def test_arithmetic_bounds_are_where_they_are_said_to_be():
    def nested(depth):
        return "(" * depth + "1" + ")" * depth

    assert evaluate(nested(MAX_DEPTH)) == (1, [1]) and evaluate(nested(MAX_DEPTH + 1)) is None
    assert evaluate("1" + " " * (MAX_LENGTH - 1)) and evaluate("1" + " " * MAX_LENGTH) is None
