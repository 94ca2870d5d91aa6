"""Files that are whole or not there at all: a reader never sees half of one, whenever the writer dies."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from es_finetune.engines import Answer
from es_finetune.errors import UserError
from es_finetune.tasks import Item, Score


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` for a file to be written to, which then reaches the disk and takes the name of `path`.

    Raises:
        OSError: It could not be written. `path` is as it was before, and nothing is left beside it.
    """
    part = path.with_name(path.name + ".tmp")
    try:
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:  # others have a text of their own
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Make `content` what the file at `path` holds, all of it or nothing.

    Raises:
        OSError: It could not be written. `path` is as it was before.
    """
    with replacing(path) as part:
        part.write_bytes(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add one object to a .jsonl file.

    Raises:
        OSError: As of a full disk. The file is as it was.
    """
    before = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")
    except OSError:
        os.truncate(path, before)
        raise


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, of a missing one none. A torn last line, which a killed writer leaves, is dropped.

    Raises:
        UserError: A line before the last is no JSON object.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif any(later.strip() for later in lines[index + 1 :]):
            raise UserError(
                f"{path} is damaged in line {index + 1}, which is not the last: it is no JSON object; remove that line"
            )
    return rows


def generation_rows(path: Path) -> list[dict[str, Any]]:
    """As `read_rows`, of a file whose rows each say of which generation they are: metrics.jsonl and evals.jsonl.

    Raises:
        UserError: One does not, or a line before the last is no JSON object.
    """
    rows = read_rows(path)
    for number, row in enumerate(rows, 1):
        if type(row.get("generation")) is not int:
            raise UserError(
                f"{path} is damaged in row {number}: it does not say of which generation it is; remove that row"
            )
    return rows


def save_answers(path: Path, items: Sequence[Item], answers: Sequence[Answer], scores: Sequence[Score]) -> None:
    """Write JSON lines, one per answer: prompt (text, or the messages of a chat), completion, reward and exact (null
    where there is none), and for an answer whose scoring failed the error.

    Raises:
        OSError: It could not be written. `path` is as it was before.
    """
    lines = []
    for item, answer, score in zip(items, answers, scores, strict=True):
        row = {"prompt": item.prompt, "completion": answer.text, "reward": score.reward, "exact": score.exact}
        lines.append(json.dumps(row | ({"error": score.error} if score.error else {})) + "\n")
    write_atomically(path, "".join(lines))
