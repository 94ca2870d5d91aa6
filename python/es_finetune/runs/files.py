"""Files that are whole or not there at all: a reader never sees half of one, whenever the writer dies."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from es_finetune.errors import UserError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write beside `path`, reach the disk, then take its name. OSError leaves what `path` held before."""
    part = path.with_name(path.name + ".tmp")
    try:
        with open(part, "wb") as file:
            file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add one object to a .jsonl file. OSError, as of a full disk, leaves the file as it was."""
    before = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")
    except OSError:
        os.truncate(path, before)
        raise


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, of a missing one none. A torn last line, which a killed writer leaves, is
    dropped."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif any(later.strip() for later in lines[index + 1 :]):
            raise UserError(
                f"{path} is damaged in line {index + 1}, which is not the last: it is no JSON object; remove that line"
            )
    return rows


def generation_rows(path: Path) -> list[dict[str, Any]]:
    """As `read_rows`, of a file whose rows each say of which generation they are: metrics.jsonl and evals.jsonl."""
    rows = read_rows(path)
    for number, row in enumerate(rows, 1):
        if type(row.get("generation")) is not int:
            raise UserError(
                f"{path} is damaged in row {number}: it does not say of which generation it is; remove that row"
            )
    return rows
