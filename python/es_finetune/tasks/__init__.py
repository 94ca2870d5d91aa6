"""Tasks: what is asked, and what an answer is worth.

A task is a plain object with four attributes and one method (`Task`). Nothing in it knows about models, tokenizers or
evolution strategies, and no method ever evaluates model text as code.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple, Protocol


class Item(NamedTuple):
    """One question.

    `prompt` is the text given to the model. `key` says which question it is and is all that scoring needs; two items
    with one key are the same question, however their prompts differ.
    """

    prompt: str
    key: Hashable


class Score(NamedTuple):
    """What one completion is worth: `reward` is what ES maximises, `exact` and `format` (0 to 1) are parts to report."""

    reward: float
    exact: float
    format: float


class Task(Protocol):
    """`train` and `test` share no key; `score` is a pure function of its arguments and never raises, whatever the text."""

    name: str
    max_new_tokens: int
    train: Sequence[Item]
    test: Sequence[Item]

    def score(self, item: Item, completion: str) -> Score: ...


def load_task(name: str) -> Task:
    """The task of this name. ValueError for an unknown name, or for a task whose train and test splits overlap."""
    from es_finetune.tasks.countdown import Countdown
    from es_finetune.tasks.countdown_char import CountdownChar

    tasks = {task.name: task for task in (CountdownChar, Countdown)}
    if name not in tasks:
        raise ValueError(f"unknown task {name!r}; choose one of: {', '.join(tasks)}")
    task = tasks[name]()
    check_disjoint(task)
    return task


def check_disjoint(task: Task) -> None:
    """ValueError if a question of the test split can also be trained on."""
    shared = {item.key for item in task.train} & {item.key for item in task.test}
    if shared:
        raise ValueError(f"task {task.name!r}: {len(shared)} question(s) are both in train and in test, e.g. {next(iter(shared))}")
