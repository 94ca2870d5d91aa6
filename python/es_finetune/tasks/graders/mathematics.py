"""The grader of the task `math`, in the worker process: math-verify parses what a model wrote.

Imported by its path, so that the worker does not import torch; it therefore imports nothing of es_finetune.
"""

from __future__ import annotations

import functools
import logging

import no_eval
from math_verify import parse, verify

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns of the time limits switched off below


def grade(answer: str, item: dict) -> float:
    r"""1 if `answer`, the inside of a \boxed{}, equals item["gold"] in math-verify's judgement, else 0."""
    return float(verify(_gold(item["gold"]), _parsed(answer), timeout_seconds=None))


def _parsed(text: str) -> list:
    # math-verify's own time limits are signals, which do not end every computation. The worker is killed from outside.
    return parse(f"\\boxed{{{text}}}", parsing_timeout=None)


_gold = functools.cache(_parsed)

no_eval.restrict()
grade("0.5", {"gold": "\\frac{1}{2}"})  # the first call builds the parser, 0.6 s, which are no answer's fault
