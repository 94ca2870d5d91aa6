"""docs/reference/files.md, made from the types of the rows."""

from __future__ import annotations

from typing import Any, get_args, get_origin, get_type_hints, is_typeddict

from es_finetune.monitor.rows import EvalRow, GenerationRow, Health, MemberLine, Summary

PURPOSES = {
    "config.json": "the options of the run",
    "run.log": "seed, coefficients and fingerprints of every generation: with the base model they are the tuned model",
    "journal": "the members of this generation that were scored: a resumed run does not score them again",
    "metrics.jsonl": "a line a generation, for curves",
    "evals.jsonl": "a line for each eval on the held-out questions",
    "summary.json": "the result; missing until the run is complete",
    "answers": "held-out answers of the base model and of the tuned one",
    "snapshots": "weights on the way, with `--snapshot_every`: a resumed run need not replay all",
    "model": "the tuned model, for `from_pretrained`",
    "reward.png": "reward and held-out curve",
    "report.html": "all of it on one page; `es-finetune report RUN` writes it",
    "tensorboard": "curves for TensorBoard, with `--report_to`",
    "wandb": "curves for Weights & Biases, with `--report_to`",
    "wandb-id": "which of its runs a resumed run continues",
}


def fields_page() -> str:
    """The page. Write it with
    `python -m es_finetune.monitor.fields_page > docs/reference/files.md`."""
    parts = [
        "# The files of a run, field by field\n\nMade from the types in `es_finetune/monitor/rows.py`. "
        "The form of `run.log` is in `es_finetune/runs/log.py`.\n\n"
        "| file or folder | what it is for |\n| --- | --- |\n",
        *(f"| `{name}` | {about} |\n" for name, about in PURPOSES.items()),
    ]
    for title, kind in (
        ("metrics.jsonl", GenerationRow),
        ("metrics.jsonl: health", Health),
        ("evals.jsonl", EvalRow),
        ("summary.json", Summary),
        ("journal", MemberLine),
    ):
        about = " ".join((kind.__doc__ or "").split())
        parts.append(f"\n## {title}\n\n{about}\n\n| field | type | meaning |\n| --- | --- | --- |\n")
        hints = get_type_hints(kind, include_extras=True)
        for name in [*(n for n in hints if n in kind.__required_keys__), *sorted(kind.__optional_keys__)]:
            of, meaning = get_args(hints[name])
            parts.append(f"| `{name}` | {_json_type(of)} | {meaning} |\n")
    return "".join(parts)


def _json_type(kind: Any) -> str:
    """The type in JSON's words: float -> number, X | None -> X or null."""
    inside = get_args(kind)
    if get_origin(kind) is list:
        return f"list of {_json_type(inside[0])}" if inside[0] is not Any else "list"
    if get_origin(kind) is dict or is_typeddict(kind):
        return "object"
    if inside:
        return " or ".join(_json_type(part) for part in inside)
    return {int: "integer", float: "number", str: "text", type(None): "null"}[kind]


if __name__ == "__main__":
    print(fields_page(), end="")
