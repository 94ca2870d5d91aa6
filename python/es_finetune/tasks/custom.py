"""Your own task: prompts from a JSON lines file or a list of dicts, and a reward function."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from es_finetune.errors import RewardFailed, UserError
from es_finetune.tasks import Data, Item, Score
from es_finetune.tasks.reward_process import RewardError, RewardProcess
from es_finetune.tasks.sandbox import (
    RewardTypeError,
    check_signature,
    finite_number,
    one_line,
    score_parts,
    source_file,
)

MIN_PROMPTS = 5  # fewer cannot be cut into a train and a test split that say anything


class Custom:
    """A record is a dict with a "prompt" (text, or a list of chat messages) and whatever else the reward needs.

    `reward(completion: str, record: dict)` returns a finite number, or a dict with "reward" and, if wanted, "exact" and
    "format" (each 0 to 1). Given as "module:function" or "file.py:function" it runs in a process of its own that is
    killed where an answer takes more than `seconds`. A callable runs in this process, without any time limit: one that
    hangs, hangs the run. A reward that raises, hangs, ends its process or returns no finite number scores `reward=None`
    with an `error`, and the run goes on. A function may declare what such an answer is worth: `reward.floor = 0.0`.

    `code_digest` tells one reward from another by content, not by path (sandbox.code_digest says what it
    covers): `RewardFailed` ends a run whose reward was changed, and a resumed one refuses another. Of a callable it is
    None: that it is the same, nobody checks.

    The prompt says which question a record is. Equal records are dropped and counted in `notes`; different records with
    one prompt are all kept, and on the same side of the split. Without `test_data` the prompts with the lowest hashes,
    `share` of them, are held out: whatever the order of the records, and the same ones in every run.
    """

    name = "custom"
    max_new_tokens = 256
    metric = "reward"
    eval_samples = 1

    def __init__(
        self,
        data: Data | None,
        reward: str | Callable[[str, dict], Any] | None,
        test_data: Data | None,
        seconds: float,
        share: float,
    ):
        if data is None or reward is None:
            raise UserError(
                "the task 'custom' needs data (a .jsonl file or dicts) and a reward (module:function, "
                "file.py:function, logprob or a callable)"
            )
        self.notes: list[str] = []
        in_process = callable(reward)
        records = self._items(data, "data", in_process)
        if test_data is not None:
            self.train, self.test = records, self._items(test_data, "test_data", in_process)
        else:
            ranked = sorted({item.key for item in records}, key=lambda key: hashlib.blake2b(key.encode()).digest())
            if len(ranked) < MIN_PROMPTS:
                raise UserError(
                    f"data has {len(ranked)} different prompts, too few to hold some out; give at least {MIN_PROMPTS}, "
                    "or test_data"
                )
            held_out = set(ranked[: max(1, round(share * len(ranked)))])
            self.train = [item for item in records if item.key not in held_out]
            self.test = [item for item in records if item.key in held_out]
            if not self.train:
                raise UserError(f"test_share {share} holds out all {len(ranked)} prompts; lower it")
        self._reward, floor, self._label, self.code_digest = _load(reward, seconds)
        try:
            self.floor = None if floor is None else finite_number(floor, "its floor")
        except ValueError as error:
            raise UserError(f"reward {self._label}: {error}") from None
        self._probe()

    def _items(self, source: Data, what: str, in_process: bool) -> list[Item]:
        items, seen = [], set()
        name, records = (
            (str(source), _read(Path(source)))
            if isinstance(source, (str, Path))
            else (what, enumerate(_iterate(source, what)))
        )
        count = 0
        for place, record in records:
            count += 1
            where = f"{name}, line {place}" if isinstance(source, (str, Path)) else f"{name}[{place}]"
            if not isinstance(record, Mapping) or not all(isinstance(field, str) for field in record):
                raise UserError(f"{where}: not an object with named fields but {type(record).__name__}")
            record = dict(record)
            prompt = _prompt(record, where)
            if not in_process:
                try:
                    json.dumps(record)
                except (TypeError, ValueError, RecursionError) as error:
                    raise UserError(
                        f"{where}: a reward in a process of its own takes records that are JSON: {one_line(error)}"
                    ) from None
            same = repr(sorted(record.items(), key=lambda field: field[0]))
            if same not in seen:
                seen.add(same)
                items.append(Item(prompt, json.dumps(prompt, sort_keys=True), record, where))
        if not items:
            raise UserError(f"{name} holds no record")
        if count > len(items):
            self.notes.append(f"{name}: {count - len(items)} of {count} records left out, for they are there already")
        return items

    def _probe(self) -> None:
        """Refuses at once a reward that returns something of the wrong type. That it may fail on an empty completion is
        no fault."""
        try:
            value = self._reward("", dict(self.train[0].data))
            score_parts(value)
        except RewardTypeError as error:
            raise UserError(
                f"reward {self._label}, tried on the first record and an empty completion: {error}"
            ) from None
        except (Exception, SystemExit):
            return

    def score(self, item: Item, completion: str) -> Score:
        """What the reward function returns for the completion as the model gave it. RewardFailed where it is no longer
        the same function."""
        try:
            value = self._reward(completion, dict(item.data))
        except RewardFailed:
            raise
        except (RewardError, RewardTypeError) as error:
            problem = str(error)
        except (Exception, SystemExit) as error:
            problem = one_line(error, source_file(self._reward))
        else:
            try:
                return Score(*score_parts(value))
            except ValueError as error:
                problem = str(error)
        return Score(
            None,
            error=f"{self._label}: {problem}; prompt {_shortened(item.prompt)}, completion {_shortened(completion)}",
        )


class LogProb(Custom):
    """A record is a dict with a "prompt" and the text of its "answer": log p(answer | prompt) is made large, with the
    end token behind it. With a text "rejected" too the reward is log p(answer) - log p(rejected).

    log p is the sum over the tokens, or with `per_token` their mean. Held-out questions are answered, and an answer is
    exact where it is the record's, but for white space around it.
    """

    metric = "exact"

    def __init__(self, data: Data | None, test_data: Data | None, share: float, per_token: bool):
        super().__init__(data, _same_text, test_data, 1.0, share)
        self.code_digest = "logprob"
        self.per_token = per_token
        for item in [*self.train, *self.test]:
            if "answer" not in item.data:
                fields = ", ".join(item.data)
                raise UserError(
                    f"{item.source}: no field 'answer', which reward logprob needs; its fields are {fields}"
                )
            for field in item.data.keys() & {"answer", "rejected"}:
                text = item.data[field]
                if not isinstance(text, str) or not text:
                    raise UserError(f"{item.source}: '{field}' is {text!r:.40}; it must be text that is not empty")
                if _has_half_of_a_pair(text):
                    raise UserError(f"{item.source}: '{field}' holds half of a surrogate pair, which is no text")

    def answers(self, item: Item) -> Sequence[str]:
        return [item.data[field] for field in ("answer", "rejected") if field in item.data]

    def score_log_probs(self, item: Item, log_probs: Sequence[Sequence[float]]) -> Score:
        answer, *rejected = (math.fsum(of) / (len(of) if self.per_token else 1) for of in log_probs)
        return Score(answer - math.fsum(rejected))


def _same_text(completion: str, record: dict) -> dict[str, float]:
    same = float(completion.strip() == record["answer"].strip())
    return {"reward": same, "exact": same}


def _load(reward: Any, seconds: float) -> tuple[Callable[[str, dict], Any], Any, str, str | None]:
    """The function to call, its declared floor, what to call it in a message, and the digest of its code where that is
    known."""
    if isinstance(reward, str):
        process = RewardProcess(reward, seconds)
        return process, process.attributes["floor"], f"{reward.rpartition(':')[2]}()", process.attributes["code"]
    if not callable(reward):
        raise UserError(
            f"the reward is of type {type(reward).__name__}; give a callable, module:function or file.py:function"
        )
    label = f"{getattr(reward, '__name__', type(reward).__name__)}()"
    try:
        check_signature(reward)
    except ValueError as error:
        raise UserError(f"reward {label}: {error}") from None
    return reward, getattr(reward, "floor", None), label, None


def _read(path: Path):
    """(line number, value) of each line that is not blank. UserError says which line is no JSON."""
    try:
        # Splitlines() also cuts at characters that a JSON text may hold
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"data {str(path)!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"data {str(path)!r} is not UTF-8: {error.reason} at byte {error.start}") from None
    for place, line in enumerate(lines, 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {place}: not JSON: {one_line(error)}") from None
            yield place, value


def _iterate(source: Any, what: str):
    try:
        return iter(source)
    except TypeError:
        raise UserError(f"{what} is of type {type(source).__name__}; give a .jsonl file or a list of dicts") from None


def _prompt(record: dict[str, Any], where: str) -> str | tuple[dict, ...]:
    if "prompt" not in record:
        fields = ", ".join(record) or "none"
        raise UserError(f"{where}: no field 'prompt'; its fields are {fields[:100]}")
    prompt = record["prompt"]
    if isinstance(prompt, (list, tuple)):
        if not prompt or not all(
            isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in prompt
        ):
            raise UserError(
                f"{where}: a prompt of chat messages is a list of objects, each with the texts 'role' and 'content'"
            )
        prompt = tuple(dict(message) for message in prompt)
        texts = [message["content"] for message in prompt]
    elif isinstance(prompt, str) and prompt:
        texts = [prompt]
    else:
        raise UserError(
            f"{where}: the prompt is {prompt!r:.40}; it must be text that is not empty, or a list of chat messages"
        )
    if any(map(_has_half_of_a_pair, texts)):
        raise UserError(f"{where}: the prompt holds half of a surrogate pair, which is no text")
    return prompt


def _has_half_of_a_pair(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _shortened(prompt: str | tuple[dict, ...]) -> str:
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return repr(text if len(text) <= 60 else text[:57] + "...")
