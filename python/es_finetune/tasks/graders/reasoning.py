"""Questions and scores of the task `reasoning-gym`, in the worker process: some scorers parse or even evaluate what a
model wrote.

Imported by its path, so that the worker does not import torch; it therefore imports nothing of es_finetune.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import pickle
import re

import no_eval
import reasoning_gym
from reasoning_gym.factory import DATASETS
from reasoning_gym.utils import SYSTEM_PROMPTS

DRAWS = 2100  # three for each question wanted; acre and others draw all of them when they are made

NONSENSE = "\u2603"  # game_of_life_halting gives full credit to any text

_NOT_FINITE = re.compile(r"(?<![a-z])(nan|inf|infinity)j?(?![a-z])", re.IGNORECASE)


def serve(text: str, item: dict) -> dict | float:
    """`questions` for an item that says how many, `grade` for one that is an entry: one process does both."""
    # Codeio runs programs that print
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return questions(text, item["seed"], item["count"]) if "count" in item else grade(text, item)


def questions(name: str, seed: int, count: int) -> dict:
    """{"system": the package's system prompt, "questions": [[question, entry], ...]}: the first `count` different
    questions of the stream that `seed` starts, or fewer if `DRAWS` draws hold no more. {"unknown": names} if there is
    no such dataset. An entry is what scoring needs, pickled: it holds types that JSON does not know, and some take
    seconds to make again.
    """
    if name not in DATASETS:
        return {"unknown": sorted(DATASETS)}
    by_question: dict[str, str] = {}
    dataset = reasoning_gym.create_dataset(name, seed=seed, size=DRAWS)
    for index in range(DRAWS):
        if len(by_question) == count:
            break
        try:
            entry = dataset[index]
            by_question.setdefault(entry["question"], base64.b64encode(pickle.dumps(entry)).decode())
        except Exception:  # codeio fails on one draw in a thousand
            if index > 20 and not by_question:
                raise
    for entry in list(by_question.values())[:10]:
        try:
            score = grade(NONSENSE, {"name": name, "entry": entry})
        except Exception:
            continue
        if score >= 1:
            raise ValueError("its scorer takes nonsense for a right answer")
    return {"system": SYSTEM_PROMPTS["default"], "questions": list(by_question.items())}


def grade(answer: str, item: dict) -> float:
    """score_answer of the dataset item["name"] for the entry item["entry"], made by `questions`. NaN and infinities are
    worth 0, unless the right answer names them: complex_arithmetic takes a NaN for right."""
    entry = pickle.loads(base64.b64decode(item["entry"]))
    if _NOT_FINITE.search(answer) and not _NOT_FINITE.search(str(entry["answer"])):
        return 0.0
    return float(_scorer(item["name"])(answer, entry))


@functools.cache
def _scorer(name: str):
    # Scoring reads the entry alone. A small dataset, for some make all their questions at once.
    scorer = reasoning_gym.create_dataset(name, seed=0, size=10).score_answer
    no_eval.restrict("reasoning_gym")  # not before: making questions may run code, the package's own
    return scorer
