"""What the log's header says of a task: its questions and how answers are scored, as digests of 16 hex digits."""

from __future__ import annotations

import datetime
import hashlib
import numbers
from collections.abc import Mapping
from typing import Any

from es_finetune.tasks import Task


def task_identity(task: Task) -> dict[str, Any]:
    """Equal for tasks that ask the same and score alike.

    Returns:
        `metric`; `train_items` and `test_items`, of the prompts; `train_scoring` and `test_scoring`, of what the items
        give the reward; `reward`, of its code, or None where the task knows none.
    """
    digests = {}
    for split in ("train", "test"):
        items = getattr(task, split)
        digests[f"{split}_items"] = _digest(repr([(item.prompt, item.key) for item in items]))
        digests[f"{split}_scoring"] = _digest(canonical([item.data for item in items]))
    return {"metric": task.metric, **digests, "reward": getattr(task, "code_digest", None)}


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "backslashreplace"), digest_size=8).hexdigest()


def canonical(value: Any) -> str:
    """Equal for equal data in any process: dicts and sets in the order of their entries' texts, arrays as lists, other
    objects by their type alone."""
    if hasattr(value, "tolist"):  # of NumPy and torch
        value = value.tolist()
    if value is None or isinstance(
        value, (str, bytes, numbers.Number, datetime.date, datetime.time, datetime.timedelta)
    ):
        return repr(value)
    if isinstance(value, Mapping):
        return f"{{{','.join(sorted(f'{canonical(key)}:{canonical(entry)}' for key, entry in value.items()))}}}"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(canonical, value))}]"
    if isinstance(value, (set, frozenset)):
        return f"set({','.join(sorted(map(canonical, value)))})"
    return f"<{type(value).__qualname__}>"
