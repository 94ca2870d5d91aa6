"""docs/files.md, made from the types of the rows."""

from __future__ import annotations

from typing import Any, get_args, get_origin, get_type_hints, is_typeddict

from es_finetune.monitor.rows import EvalRow, GenerationRow, Health, MemberLine, Summary


def fields_page() -> str:
    """The page. Write it with
    `python -m es_finetune.monitor.fields_page > docs/files.md`."""
    parts = [
        "# The files of a run, field by field\n\nMade from the types in `es_finetune/monitor/rows.py`. "
        "What each file is for is in the README, the form of `run.log` in `es_finetune/runs/log.py`.\n"
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
