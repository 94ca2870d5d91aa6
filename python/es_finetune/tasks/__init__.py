"""Tasks: what is asked, and what an answer is worth.

A task is a plain object with a few attributes and one method (`Task`). Nothing in it knows about models, tokenizers or
evolution strategies, and no method ever evaluates model text as code in this process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeGuard

from es_finetune.errors import UserError, did_you_mean


class Item(NamedTuple):
    """One question.

    `prompt` is what the model is given: raw text, or chat messages ({"role": ..., "content": ...}) which the engine
    renders with the tokenizer's chat template. `key` says which question it is; two items with one key are the same
    question, however their prompts differ. `data` is what scoring needs beyond the key. `source` says in messages where
    the question is from, as "train.jsonl, line 7".
    """

    prompt: str | tuple[dict, ...]
    key: Any  # hashable
    data: Any = None
    source: str = ""


class Score(NamedTuple):
    """What one completion is worth: `reward` is what ES maximises, `exact` and `format` (0 to 1) are parts to report.

    `reward` is None where the reward function failed: the trainer then takes the task's `floor`. `exact` is None where
    the task knows no right answer. `error` is one line saying what failed; a task that knows what a failure is worth
    gives a number all the same (math: an answer that cannot be graded in time is wrong).
    """

    reward: float | None
    exact: float | None = None
    format: float | None = None
    error: str | None = None


class Task(Protocol):
    """What is asked, and what an answer is worth: any object with these attributes.

    A task whose scoring is the user's code may have another one, `code_digest: str | None`, by which a resumed run
    knows that it is the same.
    """

    @property
    def name(self) -> str: ...

    @property
    def max_new_tokens(self) -> int:
        """How many tokens an answer may have."""

    @property
    def train(self) -> Sequence[Item]: ...

    @property
    def test(self) -> Sequence[Item]:
        """Held-out questions. It shares no key with `train`."""

    @property
    def metric(self) -> str:
        """ "exact" or "reward": the headline on held-out items."""

    @property
    def floor(self) -> float | None:
        """Reward of an answer whose scoring failed. None: the lowest of its generation."""

    @property
    def eval_samples(self) -> int:
        """Answers per held-out question: 1 is greedy, more are sampled at temperature 1."""

    @property
    def notes(self) -> Sequence[str]:
        """What loading left out or changed, one sentence each, to be shown when a run starts."""

    def score(self, item: Item, completion: str) -> Score:
        """A pure function of its arguments, which never raises, whatever the text."""


class ReadingTask(Task, Protocol):
    """A task that is trained on the log-probabilities of given answers, which the model reads and does not write.

    Held-out questions are asked as of any other task: `score` gives their answers' `exact` and `format`, and the reward
    is that of training.
    """

    def answers(self, item: Item) -> Sequence[str]:
        """One or more texts to read, none of them empty."""

    def score_log_probs(self, item: Item, log_probs: Sequence[Sequence[float]]) -> Score:
        """What they are worth.

        Args:
            item: The question.
            log_probs: Of each of the `answers` the natural log of the probability of each of its tokens, of the end
                token too.
        """


def reads(task: Task) -> TypeGuard[ReadingTask]:
    """Whether it is trained on log-probabilities."""
    return hasattr(task, "score_log_probs")


NAMES = ("countdown", "countdown-char", "conciseness", "short-answers", "math", "reasoning-gym:<name>", "custom")

Data = str | Path | Iterable[Mapping[str, Any]]
Reward = str | Callable[[str, dict], Any]


def load_task(
    name: str,
    *,
    data: Data | None = None,
    test_data: Data | None = None,
    reward: Reward | None = None,
    seed: int = 0,
    time_limit: float = 5.0,
    test_share: float = 0.2,
    logprob_per_token: bool = False,
) -> Task:
    """The task of this name, its splits checked to be disjoint.

    - countdown: needs nothing; `seed` decides the questions.
    - countdown-char: needs nothing; its split is fixed, for the embedded model was trained on it.
    - conciseness: needs nothing.
    - short-answers: needs nothing.
    - math: `data` and `test_data` are names of hub datasets, or local files and folders; the defaults are MATH levels 3
      to 5 and MATH-500.
    - reasoning-gym:<name>: any dataset of the package reasoning-gym; `seed` decides the questions.
    - custom: your own `data` and `reward`.

    Args:
        name: One of `NAMES`.
        data: Of custom: a JSON lines file or dicts, each with a "prompt".
        test_data: As `data`, to hold out.
        reward: "module:function" or "file.py:function", run in a process of its own, or a callable, run in this one
            without a time limit; or "logprob" (`custom.LogProb`).
        seed: Of the questions.
        time_limit: Seconds that scoring one answer may take where it runs in a process of its own.
        test_share: The share of custom's prompts that is held out without `test_data`.
        logprob_per_token: Of the reward "logprob": the mean over an answer's tokens instead of the sum.

    Raises:
        UserError: An unknown name, an argument that the task does not take, bad data, a reward that is none, a package
            that is not installed, splits that overlap.
    """
    if not (math.isfinite(time_limit) and time_limit > 0):
        raise UserError(f"time_limit is {time_limit}; it must be a positive number of seconds")
    if not 0 < test_share < 1:
        raise UserError(f"test_share is {test_share}; it must lie between 0 and 1")
    if reward is not None and name != "custom":
        raise UserError(f"task {name!r} has a reward of its own; reward is for the task 'custom'")
    if (data is not None or test_data is not None) and name not in ("custom", "math"):
        raise UserError(
            f"task {name!r} makes its own questions; data and test_data are for the tasks 'math' and 'custom'"
        )

    if logprob_per_token and reward != "logprob":
        raise UserError("logprob_per_token goes with reward logprob")

    task: Task
    if name == "countdown":
        from es_finetune.tasks.countdown import Countdown

        task = Countdown(seed)
    elif name == "countdown-char":
        from es_finetune.tasks.countdown_char import CountdownChar

        task = CountdownChar()
    elif name == "conciseness":
        from es_finetune.tasks.conciseness import Conciseness

        task = Conciseness()
    elif name == "short-answers":
        from es_finetune.tasks.short_answers import ShortAnswers

        task = ShortAnswers()
    elif name == "math":
        from es_finetune.tasks.mathematics import Mathematics

        task = Mathematics(data, test_data, time_limit)
    elif name.startswith("reasoning-gym:"):
        from es_finetune.tasks.reasoning import Reasoning

        task = Reasoning(name.removeprefix("reasoning-gym:"), seed, time_limit)
    elif name == "custom":
        from es_finetune.tasks.custom import Custom, LogProb

        if reward == "logprob":
            task = LogProb(data, test_data, test_share, logprob_per_token)
        else:
            task = Custom(data, reward, test_data, time_limit, test_share)
    else:
        raise UserError(
            "unknown task "
            f"{name!r}{did_you_mean(name.partition(':')[0], NAMES) or '; choose one of: ' + ', '.join(NAMES)}"
        )
    check_disjoint(task)
    return task


def check_disjoint(task: Task) -> None:
    """UserError if a question of the test split can also be trained on."""
    shared = {item.key for item in task.train} & {item.key for item in task.test}
    if shared:
        example = str(min(shared, key=str))
        raise UserError(
            f"task {task.name!r}: {len(shared)} question(s) are both in train and in test, e.g. {example[:200]}"
        )
