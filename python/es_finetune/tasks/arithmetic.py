"""Exact value of a small arithmetic expression, without `eval`.

    expression := term (("+" | "-") term)*
    term       := factor (("*" | "/") factor)*
    factor     := "-" factor | number | "(" expression ")"

Numbers are ASCII integers without leading zeros; only the space is white space. The work is bounded before it starts:
by the length of the text, then by the digits of a number and by the nesting depth. There are no powers, so a value has
at most as many digits as the text.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_LENGTH = 200  # the longest sensible answer, ((99 + 99) * 99) / 99, has 23 characters
MAX_DIGITS = 4
MAX_DEPTH = 20

# [0-9] and not \d, which also matches the digits of every other script.
_TOKEN = re.compile(r" *([0-9]+|[-+*/()]) *")


def evaluate(text: str) -> tuple[Fraction, list[int]] | None:
    """Value of `text` and its numbers in the order written, or None if it is not an expression within the bounds."""
    if len(text) > MAX_LENGTH:
        return None
    tokens: list[str] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            return None
        tokens.append(match[1])
        position = match.end()
    try:
        parser = _Parser(tokens)
        value = parser.expression(0)
        return (value, parser.numbers) if parser.peek() is None else None
    except (_NotAnExpression, ZeroDivisionError):
        return None


class _NotAnExpression(Exception):
    pass


class _Parser:
    def __init__(self, tokens: list[str]):
        self.tokens = tokens
        self.at = 0
        self.numbers: list[int] = []

    def peek(self) -> str | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def take(self) -> str:
        if self.at == len(self.tokens):
            raise _NotAnExpression
        self.at += 1
        return self.tokens[self.at - 1]

    def expression(self, depth: int) -> Fraction:
        value = self.term(depth)
        while self.peek() in ("+", "-"):
            value = value + self.term(depth) if self.take() == "+" else value - self.term(depth)
        return value

    def term(self, depth: int) -> Fraction:
        value = self.factor(depth)
        while self.peek() in ("*", "/"):
            value = value * self.factor(depth) if self.take() == "*" else value / self.factor(depth)
        return value

    def factor(self, depth: int) -> Fraction:
        if depth > MAX_DEPTH:
            raise _NotAnExpression
        token = self.take()
        if token == "-":
            return -self.factor(depth + 1)
        if token == "(":
            value = self.expression(depth + 1)
            if self.take() != ")":
                raise _NotAnExpression
            return value
        if not token.isdigit() or len(token) > MAX_DIGITS or (token[0] == "0" and token != "0"):
            raise _NotAnExpression
        self.numbers.append(int(token))
        return Fraction(int(token))
