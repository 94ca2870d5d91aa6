"""report.html: what a run did, on one page that needs nothing else, no network and no script.

Everything is read from the run's folder. What is not there is left out or called not measured, so that the page can be
made at any time, also of a run that is going on or was killed. One folder gives one page, byte for byte.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from es_finetune.config import TrainConfig, as_flags
from es_finetune.monitor.advice import swallowed
from es_finetune.monitor.health import FAITHFUL
from es_finetune.monitor.plots import HELD_OUT, draw_held_out, draw_lengths, draw_lines, draw_rewards, draw_time, svg
from es_finetune.monitor.progress import duration, value
from es_finetune.monitor.rows import EvalRow, GenerationRow, Health, meanings, worker_seconds

Row = dict[str, Any]

SAMPLES = 4  # of each kind
LONGEST = 1200  # characters of a text that are shown

# Keys of the log's header in plain words; others are shown as they are
_WORDS = {
    "es_finetune": "version of es_finetune",
    "noise_version": "version of the noise",
    "metric": "what held-out items measure",
    "model model": "model",
    "model class": "kind of model",
    "model commit": "commit on the hub",
    "model dtype": "number format of the weights",
    "model parameters": "weights",
    "model trainable": "weights that are tuned",
    "model vocabulary": "tokens of the vocabulary",
    "base_fingerprint": "fingerprint of the base model",
    "theta before": "fingerprint of the exact weights, before",
    "live before": "fingerprint of the weights computed with, before",
    "theta after": "fingerprint of the exact weights, after",
    "live after": "fingerprint of the weights computed with, after",
    "train_items": "digest of the training items",
    "train_scoring": "digest of what they give the reward",
    "test_items": "digest of the held-out items",
    "test_scoring": "digest of what these give the reward",
    "reward": "digest of the reward's code",
    "seed": "seed of the run",
}


class RunFiles(NamedTuple):
    """What the folder of a run holds, as far as a page shows it."""

    folder: Path
    config: Row
    summary: Row  # empty until the run is complete
    header: Row  # first line of run.log; empty without one
    rows: list[Row]  # of metrics.jsonl
    evals: list[Row]  # of evals.jsonl
    base_answers: list[Row]
    tuned_answers: list[Row]
    written: float | None  # when metrics.jsonl was, in seconds since 1970
    log_bytes: int | None
    has_model: bool


def page(run: RunFiles) -> str:
    """The HTML of a run, from what its folder holds."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_visible, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(duration=duration, value=value)
    template = environment.from_string(Path(__file__).with_suffix(".html.j2").read_text(encoding="utf-8"))
    return template.render(**_shown(run))


def _shown(run: RunFiles) -> dict[str, Any]:
    """What the template shows, by name."""
    folder, config, summary = run.folder, run.config, run.summary
    # A generation done again after a kill has two rows, of which the later counts.
    rows = list({row["generation"]: row for row in run.rows}.values())
    evals = list({row["generation"]: row for row in run.evals}.values())
    header = dict(_flat({name: value for name, value in run.header.items() if name not in ("run", "config", "crc")}))
    environment = _environment(header, summary)
    metric = header.get("metric", "reward")
    evals = [row for row in evals if row.get(metric) is not None]
    samples, counts = _samples(run, metric)
    chance = _chance(counts["better"], counts["worse"])
    facts: dict[str, Any] = {**_fingerprints(header, rows, summary), **header}
    facts |= {name: summary[name] for name in ("noise_version", "seed") if name in summary and name not in header}
    asked = summary.get("generations") or config.get("generations")
    return {
        "folder": shlex.quote(str(folder)),
        "model_folder": repr(str(folder / "model")),
        "task": config.get("task", "unknown task"),
        "model": config.get("model", "unknown model"),
        "written": _when(run.written),
        "finished": bool(summary),
        "done": rows[-1]["generation"] + 1 if rows else 0,
        "asked": asked,
        "metric": metric,
        "evals": evals,
        "counts": counts,
        "chance": chance,
        "change": _change(evals, metric, chance if samples else None),
        "seconds": summary.get("seconds_total") or sum(row["seconds"] for row in rows),
        "tokens": sum(row.get("tokens") or 0 for row in rows),
        "outside": _outside(rows),
        "peak": max((row.get("peak_memory_bytes") or 0 for row in rows), default=0),
        "plots": _plots(rows, metric, evals),
        "warnings": _warnings(rows),
        "poor": _poor(rows, norms=False),
        "norms": _poor(rows, norms=True),
        "faithful": FAITHFUL,
        "correlation_measured": any(_health("correlation_min")(row) is not None for row in rows),
        "failed": sum(row.get("failed") or 0 for row in rows),
        "failures": _failures(rows),
        "samples": samples,
        "environment": environment,
        "command": _command(config, folder),
        "config": {name: _plain(value) for name, value in config.items()},
        "help": {field.name: field.metadata["help"] for field in dataclasses.fields(TrainConfig)},
        "facts": {_WORDS.get(name, name): text for name, text in facts.items()},
        "log_bytes": run.log_bytes,
        "has_model": run.has_model,
    }


def _environment(header: dict[str, str], summary: Row) -> dict[str, str]:
    """Where and with what the run began, in plain words. It takes what it tells out of the header."""
    names = {
        "machine gpu": "GPU",
        "machine driver": "GPU driver",
        "machine processor": "processor",
        "versions python": "Python",
        "versions torch": "torch",
        "versions transformers": "transformers",
        "versions es_kernels": "es_kernels",
    }
    told = {name: header.pop(key, "not recorded") for key, name in names.items()}
    return {**told, "kernels served by": summary.get("backend", "not recorded")}


def _command(config: Row, folder: Path) -> str:
    """The command line that asks for this run: the options that differ from the defaults."""
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(TrainConfig)
    }
    changed = {name: value for name, value in config.items() if name in defaults and value != defaults[name]}
    return shlex.join(["es-finetune", "train", *as_flags({**changed, "output": str(folder)})])


def _flat(row: Row, before: str = "") -> list[tuple[str, str]]:
    pairs = []
    for name, inner in row.items():
        pairs += _flat(inner, f"{before}{name} ") if isinstance(inner, dict) else [(f"{before}{name}", _plain(inner))]
    return pairs


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else "none" if value is None or value == [] else json.dumps(value)


def _when(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _outside(rows: list[Row]) -> float | None:
    """Share of the workers' time outside of answering and scoring."""
    whole = sum(worker_seconds(row) for row in rows)
    return (
        1 - sum((row.get("seconds_generate") or 0) + (row.get("seconds_score") or 0) for row in rows) / whole
        if whole
        else None
    )


def _health(name: str):
    """row -> that number of its sampled health, None where it was not sampled; of a pair [tensor, number] the
    number."""

    def read(row: Row) -> float | None:
        measured = (row.get("health") or {}).get(name)
        return measured[1] if isinstance(measured, list) else measured

    return read


def _plots(rows: list[Row], metric: str, evals: list[Row]) -> list[dict[str, Any]]:
    """Groups of plots: {"title", "plots": [(title, what it shows, svg or None, {key in the files: its meaning})]}."""
    from markupsafe import Markup

    def has(read) -> bool:
        return any(read(row) is not None for row in rows)

    def of(name: str):
        return lambda row: row.get(name)

    def lines(percent: bool = False, **reads):
        return partial(draw_lines, rows=rows, lines=reads, percent=percent)

    relative = has(_health("drift_relative"))
    drift = _health("drift_relative" if relative else "drift")
    noise, step = _health("correlation_min"), _health("step_correlation")
    realised = {"noise, worst tensor": noise, "step": step}
    kept = (
        "In bf16 with master fp32 or host a step below 1 is normal: what the weights cannot show yet is kept in theta."
    )
    held_out = "Items that were never trained on, with 95% intervals. Higher is better. Dotted: the base model."
    groups: list[tuple[str, list[tuple[str, str, Any, Callable[..., None], list[str]]]]] = [
        (
            "Learning",
            [
                (
                    HELD_OUT[metric],
                    held_out,
                    evals,
                    partial(draw_held_out, metric=metric, evals=evals),
                    [metric, "low", "high"],
                ),
                (
                    "Reward of the population",
                    "Each member's mean over the training prompts of its generation. Higher is better.",
                    rows,
                    partial(draw_rewards, rows=rows),
                    ["reward_mean", "reward_min", "reward_max", "reward_q25", "reward_q75"],
                ),
            ],
        ),
        (
            "Health",
            [
                (
                    "Spread of the rewards",
                    "Standard deviation between members: the signal. At zero nothing is learned.",
                    rows,
                    lines(spread=of("reward_std")),
                    ["reward_std"],
                ),
                (
                    "Distance from the base model",
                    "How far the tuned weights have moved: root mean square of the change"
                    + (", in percent of the weights' own." if relative else "."),
                    has(drift),
                    lines(relative, drift=drift),
                    ["drift_relative" if relative else "drift"],
                ),
                (
                    "How much of noise and step the weights hold",
                    "Correlation of the change that was meant with the one the weights' dtype could hold. 1 is all of "
                    f"it. {kept}",
                    has(noise) or has(step),
                    partial(
                        draw_lines,
                        rows=rows,
                        lines={label: read for label, read in realised.items() if has(read)},
                        correlation=True,
                    ),
                    ["correlation_min", "step_correlation"],
                ),
                (
                    "Members with identical answers",
                    "Share of members that answered every prompt as another member did. High: sigma is too small.",
                    has(of("identical")),
                    lines(True, identical=of("identical")),
                    ["identical"],
                ),
            ],
        ),
        (
            "Time and length",
            [
                (
                    "Where a generation's time goes",
                    "Shares of its seconds; below, of the whole run.",
                    rows,
                    partial(draw_time, rows=rows),
                    ["seconds", "seconds_generate", "seconds_score", "seconds_kernels"],
                ),
                (
                    "Tokens per second",
                    "Generated tokens of all members. Higher is better.",
                    any(row.get("tokens_per_second") for row in rows),  # where answers are read there are none
                    lines(tokens=of("tokens_per_second")),
                    ["tokens_per_second"],
                ),
                (
                    "Length of the answers",
                    "In tokens. A length at the limit means that answers are cut off.",
                    has(of("answer_tokens")) or any(row.get("answer_tokens") is not None for row in evals),
                    partial(draw_lengths, rows=rows, evals=evals),
                    ["answer_tokens", "answer_tokens_q10", "answer_tokens_q90"],
                ),
            ],
        ),
    ]
    words = meanings(EvalRow) | meanings(Health) | meanings(GenerationRow)
    return [
        {
            "title": title,
            "plots": [
                (name, about, Markup(svg(name, draw)) if there else None, {key: words[key] for key in keys})
                for name, about, there, draw, keys in plots
            ],
        }
        for title, plots in groups
    ]


def _warnings(rows: list[Row]) -> list[dict[str, Any]]:
    """Each kind once, the numbers in its text aside: its latest words, how often, and in which generations (from 1)."""
    kinds: dict[str, dict[str, Any]] = {}
    for row in rows:
        for text in row.get("warnings") or []:
            entry = kinds.setdefault(re.sub(r"[\d.]+", "#", text), {"generations": []})
            entry["text"] = text
            entry["generations"].append(row["generation"] + 1)
    return [
        {"text": entry["text"], "count": len(entry["generations"]), "where": _ranges(entry["generations"])}
        for entry in kinds.values()
    ]


def _ranges(numbers: list[int], most: int = 8) -> str:
    """1, 2, 3, 7 -> "1–3, 7"; the tail of a long list is counted instead."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number - runs[-1][1] <= 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ", ".join(f"{a}" if a == b else f"{a}–{b}" for a, b in runs[:most])
    return text + (
        f" and {sum(b - a + 1 for a, b in runs[most:])} more, the last {runs[-1][1]}" if len(runs) > most else ""
    )


def _poor(rows: list[Row], norms: bool) -> list[dict[str, Any]]:
    """Norm weights, or all other tensors, whose realised correlation was seen under FAITHFUL, the worst first: name,
    worst, its rms ratio and generation, how often."""
    tensors: dict[str, dict[str, Any]] = {}
    for row in rows:
        for name, (correlation, ratio) in swallowed(row, norms).items():
            entry = tensors.setdefault(name, {"name": name, "worst": math.inf, "times": 0})
            entry["times"] += 1
            if correlation < entry["worst"]:
                entry.update(worst=correlation, ratio=ratio, generation=row["generation"] + 1)
    return sorted(tensors.values(), key=lambda entry: entry["worst"])


def _change(evals: list[Row], metric: str, chance: float | None) -> str:
    """ "gain" or "loss", where what became of the same answers says so (`chance`), or without them intervals that do
    not meet; else ""."""
    if not evals:
        return ""
    first, last = evals[0], evals[-1]
    before, after = first[metric], last[metric]
    if before == after:
        return ""
    if chance is None:
        ends = [row[end] for row in (first, last) for end in ("low", "high") if row.get(end) is not None]
        certain = len(ends) == 4 and (ends[3] < ends[0] or ends[1] < ends[2])
    else:
        certain = chance < 0.05
    return ("gain" if after > before else "loss") if certain else ""


def _failures(rows: list[Row]) -> list[str]:
    """Examples of failed rewards, no two alike."""
    examples = dict.fromkeys(_cut(_plain(row["failed_example"])) for row in rows if row.get("failed_example"))
    return list(examples)[:3]


def _fingerprints(header: dict[str, str], rows: list[Row], summary: Row) -> dict[str, str]:
    """Of the weights before and after: theta, the exact ones, and live, those the model computes with."""
    last = rows[-1] if rows else {}
    after = {
        "theta": summary.get("fingerprint") or last.get("theta"),
        "live": summary.get("live") or last.get("live"),
    }
    before = {f"{name} before": header.pop(name) for name in ("theta", "live") if name in header}
    return {**before, **{f"{name} after": text for name, text in after.items() if text}}


def _samples(run: RunFiles, metric: str) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Held-out answers of base and tuned side by side, and how many became better, worse or stayed.

    Of each kind SAMPLES are taken at equal distances through the items, not the best of them.
    """
    kinds: dict[str, list[tuple[Row, Row]]] = {"better": [], "worse": [], "same": []}
    for before, after in zip(run.base_answers, run.tuned_answers, strict=False):
        a, b = before.get(metric), after.get(metric)
        if before.get("prompt") != after.get("prompt") or a is None or b is None:
            continue
        kinds["better" if b > a else "worse" if b < a else "same"].append((before, after))
    words = (
        {"better": "became right", "worse": "became wrong", "same": "unchanged"}
        if metric == "exact"
        else {"better": "better", "worse": "worse", "same": "unchanged"}
    )
    samples = []
    for kind, pairs in kinds.items():
        count = min(SAMPLES, len(pairs))
        for before, after in (pairs[i * len(pairs) // count] for i in range(count)):
            sides = [
                {"text": _cut(row.get("completion") or ""), "reward": row.get("reward"), "exact": row.get("exact")}
                for row in (before, after)
            ]
            samples.append(
                {"kind": kind, "word": words[kind], "prompt": _cut(_prompt(before.get("prompt"))), "sides": sides}
            )
    return samples, {kind: len(pairs) for kind, pairs in kinds.items()}


def _prompt(prompt: Any) -> str:
    """A text as it is; chat messages each under its role."""
    if isinstance(prompt, list):
        return "\n\n".join(
            f"{message.get('role')}: {message.get('content')}" if isinstance(message, dict) else str(message)
            for message in prompt
        )
    return str(prompt)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text) - LONGEST:,} more characters)"


def _chance(better: int, worse: int) -> float | None:
    """Two-sided sign test: how probable a split at least this uneven is if an item becomes better or worse by chance.
    None for no items."""
    n, ways, sum_of_ways = better + worse, 1, 0
    for i in range(min(better, worse) + 1):  # ways: to choose i of n
        sum_of_ways += ways
        ways = ways * (n - i) // (i + 1)
    return min(1.0, 2 * sum_of_ways / 2**n) if n else None


# What is no character, what a terminal would obey, and what turns the direction of the text around it.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def _visible(value: Any) -> Any:
    """Text as a page can hold it: a character of _UNSEEN is named instead."""
    return (
        value
        if not isinstance(value, str) or hasattr(value, "__html__")
        else _UNSEEN.sub(lambda mark: f"[U+{ord(mark[0]):04X}]", value)
    )
