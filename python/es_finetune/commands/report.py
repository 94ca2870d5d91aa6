"""`es-finetune report`: report.html in the folder of a run, whether it is complete, goes on or was killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from es_finetune.commands import takes_options_of
from es_finetune.config import ReportConfig
from es_finetune.errors import UserError
from es_finetune.monitor.report import RunFiles, page
from es_finetune.runs.files import generation_rows, read_rows, write_atomically
from es_finetune.runs.log import read_log


@takes_options_of(ReportConfig)
def report(config: ReportConfig) -> Path:
    """Write RUN/report.html, one page with the plots and sample answers of a run.

    What the folder lacks is left out or called not measured. One folder gives one page, byte for byte.

    Args:
        run: Folder of the run.

    Returns:
        The path of the page.

    Raises:
        UserError: The folder holds no run of es_finetune, or a damaged one.
        OSError: The page cannot be written.
    """
    path = Path(config.run) / "report.html"
    write_atomically(path, page(_read(Path(config.run))))
    return path


def _read(folder: Path) -> RunFiles:
    config, summary = _object(folder / "config.json"), _object(folder / "summary.json")
    if config is None:
        raise UserError(f"{folder} holds no run of es_finetune: it has no config.json")
    log, metrics = folder / "run.log", folder / "metrics.jsonl"
    return RunFiles(
        folder=folder,
        config=config,
        summary=summary or {},
        header=_header(log),
        rows=generation_rows(metrics),
        evals=generation_rows(folder / "evals.jsonl"),
        base_answers=read_rows(folder / "answers" / "base.jsonl"),
        tuned_answers=read_rows(folder / "answers" / "tuned.jsonl"),
        written=metrics.stat().st_mtime if metrics.exists() else None,
        log_bytes=log.stat().st_size if log.exists() else None,
        has_model=(folder / "model").is_dir(),
    )


def _object(path: Path) -> dict[str, Any] | None:
    """A JSON file's object; None if there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is no JSON object")
    return value


def _header(log: Path) -> dict[str, Any]:
    """What run.log says of the run: versions, model, fingerprints at the start. Of a damaged log, what is wrong."""
    if not log.exists():
        return {}
    try:
        return read_log(log)[0]
    except UserError as error:
        return {"run.log": str(error)}
