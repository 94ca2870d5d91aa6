"""Writes the tables of the README, of bench/README.md and of docs/results/ from bench/results/*.json.

python -m bench.publish.tables                    rewrite the pages
python -m bench.publish.tables --check            exit with 1 if one differs (a test does the same)
python -m bench.publish.tables --tables FOLDER    print the tables of a machine's results, such as gpu.sh leaves
"""

import argparse
import itertools
import json
import math
import pathlib
import re
import statistics
import sys

from bench import RESULTS, ROOT
from bench.common import gpus, shapes
from bench.publish import targets

PAGES = (
    "README.md",
    "bench/README.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs/results").glob("*.md")),
)


def results(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def cpu():
    return calls(results("kernels-cpu"))


def calls(report):
    """One flat tensor. On a CPU ns a value for instruction sets and threads; on a GPU the distance of each backend to
    its limits."""
    facts = report["machine"]
    size = max(
        r["elements"]
        for r in report["calls"]
        if "gpu" not in facts and "times_torch" in r or "gpu" in facts and r["elements"] <= 1 << 27
    )
    measured = [
        r
        for r in report["calls"]
        if r["elements"] == size and r["dtype"] != "f16" and "stochastic" not in r["operation"]
    ]
    if "gpu" in facts:
        header = ["", "backend", "ms", "GB/s", "of a copy", "normals / s", "of the instructions it can issue"]
        body = [_gpu_row(r) for r in measured if r["operation"] != "p.add_(s * torch.randn(p.shape))"]
        about = f"{facts['gpu']}, driver {facts['driver']}, torch {facts['torch']}, triton {facts['triton']}"
        return f"{about}, {size:,} elements.\n\n" + table(header, body)
    cells = {(r["isa"], r["threads"], r["dtype"], r["operation"]): r for r in measured}
    columns = sorted(
        {(isa, threads) for isa, threads, *_ in cells}, key=lambda c: (["avx512", "avx2", "baseline"].index(c[0]), c[1])
    )
    header = [
        "ns a value (times torch)",
        *(f"{isa}, {_count(threads, 'thread')}" for isa, threads in columns),
    ]
    body = []
    for dtype, operation in dict.fromkeys(key[2:] for key in cells):
        rows = [cells.get((*column, dtype, operation)) for column in columns]
        if all(rows):
            label = operation if dtype in operation else f"{operation}, {dtype}"
            body.append(
                [
                    label,
                    *(f"{_ns(r):.2f}" + (f" ({r['times_torch']:.1f} x)" if "times_torch" in r else "") for r in rows),
                ]
            )
    return f"{facts['processor']}, torch {facts['torch']}, {size:,} elements.\n\n" + table(header, body)


def _ns(row):
    """A value, and of the update a normal."""
    return row["seconds"] / row["elements"] / max(1, row.get("seeds", 1)) * 1e9


def low_rank():
    report = results("low_rank-cpu")
    best = report["rows"][0]["isa"]
    rows = [r for r in report["rows"] if r["isa"] == best and r["what"] != "restore"]
    cells = {(r["on"], r["operation"], r["threads"]): r for r in rows}
    threads = sorted({r["threads"] for r in rows})
    header = [
        "ns a value and seed",
        *(_count(n, "thread") for n in threads),
        "",
        f"{threads[-1]} threads to 1",
    ]
    body = []
    for on, operation in dict.fromkeys((r["on"], r["operation"]) for r in rows):
        of = [cells[on, operation, n] for n in threads]
        beside = [f"{r['full_noise_takes']:.3g} x full" for r in of[:1] if "full_noise_takes" in r]
        beside += [f"{r['times_restore']:.2f} x restore" for r in of[:1] if "times_restore" in r]
        times = [f"{1e9 * r['seconds'] / r['elements'] / max(1, r['seeds']):.3g}" for r in of]
        size = f"{on}, {of[0]['elements'] / 1e6:.3g} M"
        body.append([f"{operation}; {size}", *times, ", ".join(beside), f"{of[-1].get('one_thread_takes', 1):.2f}"])
    model, members = "Qwen2.5-7B", 1024
    seconds = {
        r["kernel"]: sum(map(math.prod, shapes.parameter_shapes(model).values()))
        * members
        / r["predicted"]["normals_per_s"]
        for r in results("static_analysis")["predictions"]
        if r["gpu"] == "H200 SXM" and r["kernel"] in ("update", "update rank 1")
    }
    predicted = (
        f"Predicted from instruction counts, not measured: an update of {members} members of {model} takes an H200 "
        f"{seconds['update rank 1']:.2f} s at rank 1, {seconds['update']:.1f} s with full noise."
    )
    return f"{report['machine']['processor']}, {best}.\n\n" + table(header, body) + f"\n\n{predicted}"


def members():
    report = results("members-cpu")
    others = [way for way in ("one by one", "PEFT") if any(way in r["ways"] for r in report["rows"])]
    header = ["tokens / s", "plain", "one batch", "of plain"]
    header += [column for way in others for column in (way, f"time of {way} / one batch")]
    header.append("whole generation: one by one / one batch")
    body = []
    for r in report["rows"]:
        speed = {way: f"{of['tokens_per_s']:.3g}" for way, of in r["ways"].items()}
        members_ = _count(r["members"], "member")
        row = [f"{r['model']}, {members_} x {r['prompts']} prompts, {r['tokens']} tokens"]
        row += [speed["plain"], speed["one batch"], f"{r['share_of_plain']:.0%}"]
        for way in others:
            row += [speed[way], f"{r[f'{way} takes']:.2f} x"] if way in speed else ["", ""]
        body.append([*row, f"{r['generation one by one takes']:.2f} x"])
    model, gpu, prompts, position = "Qwen2.5-7B", "H200 SXM", 8, 256
    steps = []
    for count in (30, 128):
        step = gpus.decoding_step(model, gpu, count, prompts, position)
        times = [f"{1e3 * step['plain']:.1f} ms", f"{1e3 * step['one batch']:.1f} ms"]
        share, one_by_one = f"{step['plain'] / step['one batch']:.0%}", f"{1e3 * step['one by one']:.0f} ms"
        steps.append([f"{count} members x {prompts} prompts", *times, share, one_by_one])
    about = (
        "**Predicted** from bytes and operations ([gpus.py](../../bench/common/gpus.py), `decoding_step`), not "
        f"measured: the least time of one token of every row of {model} in bf16, after {position} others."
    )
    predicted = table([f"{gpu}, predicted", "plain", "one batch", "of plain", "one by one"], steps)
    machine = f"{report['machine']['processor']}, rank {report['noise_rank']}."
    return "\n\n".join([machine, table(header, body), about, predicted])


def conciseness():
    report = results("conciseness-cpu")
    setting = report["setting"]
    body = [["base model", "", "", "", "", f"{report['base']:.0f}", ""]] + [
        [
            f"{run['way']}, seed {run['seed']}",
            str(len(run["generations"])),
            f"{sum(g['tokens'] for g in run['generations']) / run['generations'][-1]['until']:.3g}",
            *(f"{run['generations'][k]['reward']:.0f}" for k in (0, -1)),
            f"{run['final']:.0f}",
            f"{run['kl']:.3f} ± {run['kl_standard_error']:.3f}",
        ]
        for run in sorted(report["runs"], key=lambda run: run["way"])
    ]
    header = [
        "",
        "generations",
        "tokens / s",
        "reward, first generation",
        "last",
        "held-out reward",
        "KL to the base, nats a token",
    ]
    about = (
        f"{report['model']}, {report['machine']['processor']}, one thread a run and {report['processes']} at once; "
        f"{setting['population']} members x 2 prompts, sigma = lr = {setting['sigma']}, "
        f"{setting['seconds'] / 60:.0f} minutes of generations each."
    )
    return f"{about}\n\n" + table(header, body)


def short_answers():
    """What demo-llm teaches, by kind of question."""
    report = results("short_answers-cpu")
    runs = report["runs"]
    gains = ", ".join(f"{run['base']:.0%} -> {run['final']:.0%}" for run in runs)
    minutes = statistics.mean(run["seconds"] for run in runs) / 60
    seeds = ", ".join(str(run["seed"]) for run in runs)
    about = (
        f"SmolLM2-135M-Instruct, {report['machine']['processor']}: held-out answers that are the reference "
        f"**{gains}**, with seeds {seeds}. A run takes {minutes:.0f} minutes on one thread."
    )
    header = ["held-out questions", "training saw", "number", "base: exact", "base: holds the answer", "tuned: exact"]
    body = []
    for rows in zip(*(run["kinds"] for run in runs), strict=True):
        row = rows[0]
        seen = "others of this kind" if row["trained"] else "none"
        counts = [str(row[key]) for key in ("questions", "base exact", "base holds")]
        tuned = ", ".join(str(other["tuned exact"]) for other in rows)
        body.append([row["kind"].format("..."), seen, *counts, tuned])
    return f"{about}\n\n" + table(header, body)


def short_answers_examples():
    """Answers before and after, of the first seed."""
    rows = results("short_answers-cpu")["runs"][0]["examples"]
    return table(["question", "base", "tuned"], [[" ".join(text.split()) for text in row] for row in rows])


def countdown_smollm2():
    """How far held-out answers come, before and after, and their format on the way."""
    report = results("countdown_smollm2-cpu")
    runs = report["runs"]
    minutes = ", ".join(f"{run['seconds'] / 60:.0f}" for run in runs)
    about = (
        f"SmolLM2-135M-Instruct, {report['machine']['processor']}, {report['threads']} threads; "
        f"{_count(len(runs), 'seed')}, {len(runs[0]['generations'])} generations, {minutes} minutes."
    )
    header = [f"of {runs[0]['counts']['base']['answers']} held-out answers", "base", "tuned"]
    steps = {
        "end of thoughts": "end their thoughts",
        "answer block": "hold an answer block",
        "whole form": "have the whole form",
        "expression": "have an expression in the block",
        "its numbers": "of just the given numbers",
        "exact": "that reaches the target (exact)",
    }
    body = [
        [text, *(", ".join(str(run["counts"][when][key]) for run in runs) for when in ("base", "tuned"))]
        for key, text in steps.items()
    ]
    at = [row[1] for row in runs[0]["curve"]]
    curve = [[f"seed {run['seed']}", *(f"{row[3]:.2f}" for row in run["curve"])] for run in runs]
    formats = table(["held-out format, generation", *map(str, at)], curve)
    return "\n\n".join([about, table(header, body), formats])


def _count(number, thing):
    return f"{number} {thing}{'s' * (number != 1)}"


def countdown_smollm2_examples():
    """Answers before and after, of the first seed; the line breaks are shown as spaces."""
    rows = results("countdown_smollm2-cpu")["runs"][0]["examples"]
    shown = [[re.search(r"With the numbers (.*?)\. ", prompt)[1], *map(_in_code, texts)] for prompt, *texts in rows]
    return table(["question", "base", "tuned"], shown)


def _in_code(text):
    plain = " ".join(text.split()).replace("|", "/").replace("`", "'")
    return f"`{plain[:160]}{' ...' if len(plain) > 160 else ''}`"


def short_answers_methods():
    """ES beside gradients, by the clock: held-out exact answers, and peak memory."""
    ours, others = results("short_answers-cpu"), results("short_answers_trl")
    groups = {"ES, rank 1, one batch": ours["runs"]}
    for run in others["runs"]:
        groups.setdefault(f"TRL {run['method']}", []).append(run)
    minutes = (1, 2, 4, 6, 9)
    header = ["one CPU thread", "seeds", "learns from", *(f"after {m} min" for m in minutes), "peak memory"]
    body = []
    for name, runs in groups.items():
        at = [[_exact_at(run["curve"], 60 * m) for run in runs] for m in minutes]
        memory = max(run["peak_memory_bytes"] for run in runs) / 1e9
        source = "rewards of its own answers" if "GRPO" in name else "reference answers"
        body.append([name, str(len(runs)), source, *map(_from_to, at), f"{memory:.1f} GB"])
    versions = others["machine"]
    about = f"Held-out exact answers, lowest to highest seed. TRL {versions['trl']}, {versions['processor']}."
    return f"{about}\n\n" + table(header, body)


def short_answers_grpo():
    """GRPO's own reward by the clock: means over the answers of each third of the time."""
    report = results("short_answers_grpo")
    third = report["runs"][0]["seconds"] / 3
    parts = [f"minutes {third * k / 60:.2g} to {third * (k + 1) / 60:.2g}" for k in range(3)]
    header = ["TRL", "steps", *(f"mean reward, {part}" for part in parts), "held-out exact", "format", "peak memory"]
    body = []
    for run in report["runs"]:
        thirds = [[reward for spent, _, reward in run["rewards"] if spent // third == k] for k in range(3)]
        _, steps, exact, format = run["curve"][-1]
        rewards = [f"{statistics.mean(of):.2f}" for of in thirds]
        body.append([run["method"], str(steps), *rewards, f"{exact:.0%}", f"{format:.0%}"])
        body[-1].append(f"{run['peak_memory_bytes'] / 1e9:.1f} GB")
    versions = report["machine"]
    return f"TRL {versions['trl']}, {versions['processor']}, one thread, float32, one seed.\n\n" + table(header, body)


def _exact_at(curve, seconds):
    """Of the last eval until then; None where the run ended well before."""
    before = [exact for until, _, exact, _ in curve if until <= seconds]
    return before[-1] if curve[-1][0] > 0.8 * seconds else None


def _from_to(shares):
    if None in shares:
        return ""
    low, high = f"{min(shares):.0%}", f"{max(shares):.0%}"
    return low if low == high else f"{low} to {high}"


def _gpu_row(r):
    normals = f"{r['normals_per_s']:.3g}" if "normals_per_s" in r else ""
    issue = f"{r['share_of_issue']:.0%}" if "share_of_issue" in r else ""
    return [
        r["operation"],
        r["backend"],
        f"{r['seconds'] * 1e3:.3f}",
        f"{r['gb_per_s']:.0f}",
        f"{r['share_of_copy']:.0%}",
        normals,
        issue,
    ]


def baselines(report=None):
    """Ours against what people do, on the shapes of real models."""
    report = report or results("kernels-cpu")
    parts = []
    for model in dict.fromkeys(r["model"] for r in report["rivals"]):
        rows = [r for r in report["rivals"] if r["model"] == model]
        whats = list(dict.fromkeys((r["what"], r["seeds"]) for r in rows))
        titles = ["one member" if what == "member" else f"update, {seeds} seeds" for what, seeds in whats]
        header = [
            f"{model}, bf16",
            *(f"{title}: {column}" for title in titles for column in ("seconds", "ratio", "extra memory")),
        ]
        body = []
        why = {
            (e.get("who"), e.get("what")): e["why"]
            for e in report.get("left_out", ())
            if (e["kind"], e.get("model")) == ("rivals", model)
        }
        for who in dict.fromkeys([*(r["who"] for r in rows), *(who for who, _ in why if who)]):
            mine = {r["what"]: r for r in rows if r["who"] == who}
            cells = (
                _baseline_cells(mine[what]) if what in mine else (why.get((who, what), ""), "", "") for what, _ in whats
            )
            body.append([who, *itertools.chain(*cells)])
        parts.append(table(header, body))
    return "\n\n".join(parts)


def _baseline_cells(r):
    """Of a GPU's row the host's seconds too; what waits for the GPU has none of its own."""
    host = "" if "host_seconds" not in r else f" (host {r['host_seconds']:.2g})" if r["queued"] else " (waits)"
    return f"{r['seconds']:.3g}{host}", f"{r['times_ours']:.2f}", _bytes(r["peak_extra_bytes"])


def _bytes(n):
    return f"{n / 1e9:.2f} GB" if n >= 1e8 else f"{n / 1e6:.0f} MB" if n >= 1e6 else "under 1 MB"


def launches(report):
    """Whole models in one launch, and how that compares with a flat tensor of their size."""
    header = ["model", "tensors", "", "backend", "ms", "GB/s", "times a flat tensor"]
    body = [
        [
            r["model"],
            str(r["tensors"]),
            r["operation"],
            r["backend"],
            f"{r['seconds'] * 1e3:.3g}",
            f"{r['gb_per_s']:.0f}",
            f"{r['times_flat']:.3f}",
        ]
        for r in report["tables"]
    ]
    return table(header, body)


def generation(report=None):
    """Whole generations, the reference's beside ours; and from which length of answers on handling weights stops to
    matter."""
    report = report or results("generation-cpu")
    reference, ours = targets.REFERENCE, targets.OURS
    cells = {(r["model"], r["workload"], r["way"]): r for r in report["generations"]}
    body, guessed = [], []
    for model, workload in dict.fromkeys(key[:2] for key in cells):
        theirs, mine = cells[model, workload, reference], cells[model, workload, ours]
        parts = [part for part in ("answers", "update") if not theirs[f"{part}_measured"]]
        if parts:
            guessed.append(
                [
                    model,
                    workload,
                    str(theirs["population"]),
                    " and ".join(parts),
                    *(f"{r['share_of_weights']:.2%}" for r in (theirs, mine)),
                ]
            )
        else:
            seconds = (f"{theirs[part]:.3g}" for part in ("answers", "rewards"))
            shares = (
                text
                for r in (theirs, mine)
                for text in (f"{r['weights']:.3g} + {r['update']:.3g}", f"{r['share_of_weights']:.2%}")
            )
            body.append(
                [model, workload, str(theirs["population"]), *seconds, *shares, f"{1 - mine['times_reference']:.1%}"]
            )
    header = [
        "model",
        "task",
        "N",
        "answers, s",
        "rewards, s",
        "es-at-scale: weights + update, s",
        "share",
        "ours: weights + update, s",
        "share",
        "whole generation saved",
    ]
    parts = [table(header, body)]
    if guessed:
        parts.append(
            table(
                [
                    "extrapolated (generation_cost.py, generation.py)",
                    "task",
                    "N",
                    "what",
                    "es-at-scale: share",
                    "ours: share",
                ],
                guessed,
            )
        )
    body = []
    for model in dict.fromkeys(r["model"] for r in report["break_even"]):
        rows = {r["way"]: r for r in report["break_even"] if r["model"] == model}
        extra = (_bytes(max(rows[method]["peak_extra_bytes"].values())) for method in (reference, ours))
        body.append(
            [
                model,
                *(_tokens(rows[method]["tokens"][share]) for method in (reference, ours) for share in ("0.1", "0.01")),
                *extra,
            ]
        )
    header = [
        "200 questions, N = 30",
        "es-at-scale: a tenth",
        "a hundredth",
        "ours: a tenth",
        "a hundredth",
        "temporary memory: es-at-scale",
        "ours",
    ]
    return "\n\n".join([*parts, table(header, body)])


def _tokens(n):
    return f"{n} tokens" if n > 1 else "never"


def countdown():
    """The paper's main task, as its reference runs it. A prediction, from gpus.py's rates."""
    gpu, values = gpus.GPUS["H200 SXM"], sum(map(math.prod, shapes.parameter_shapes("Qwen2.5-7B").values()))
    bandwidth = gpu.gb_per_s * 1e9 * gpus.COPY_SHARE
    weights, answers = (24 + 16) * values / bandwidth, 1024 * 2 * values / bandwidth
    return (
        "Predicted for Qwen2.5-7B in bf16 on an H200: the reference moves 24 bytes a weight to perturb and restore a "
        "member and 16 more for its part of the update, "
        f"{weights * 1e3:.0f} ms at {bandwidth / 1e12:.1f} TB/s. Each of 1024 tokens reads all weights, which alone "
        f"takes {answers:.1f} s. So of the paper's Countdown handling weights "
        f"is at most {weights / (weights + answers):.1%}."
    )


def memory():
    """What a master costs, in bytes and in KV cache. Arithmetic."""
    rows = results("generation-cpu")["memory"]
    held = {
        "fp32": "master fp32",
        "copy": "master copy",
        "None": "master None",
        "es-at-scale": "es-at-scale's temporaries",
    }
    body = [[r["model"], *(_in_cache(r[key]) for key in held)] for r in rows if r["model"] != "50M"]
    return table(["bf16 model", *held.values()], body)


def _in_cache(held):
    return f"{held['bytes'] / 1e9:.1f} GB = {held['kv_tokens']:,} tokens" if held["bytes"] else "none"


def hours():
    """The least time that the paper's Countdown takes, one member after the other. A prediction, from gpus.py's
    rates."""
    generations, members, prompts, tokens = 500, 30, 200, 1024
    names = ("A100 80GB SXM", "H100 SXM", "H200 SXM")
    body = []
    for model in ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B", "Llama-3.1-8B"):
        values = sum(map(math.prod, shapes.parameter_shapes(model).values()))
        cells = []
        for gpu in names:
            step = gpus.decoding_step(model, gpu, members, prompts, tokens / 2)["one by one"]  # of a token, on average
            cells.append(f"{generations * tokens * step / 3600:.2g} h")
        body.append([model, f"{2 * values / 1e9:.1f} + {4 * values / 1e9:.1f} GB", *cells])
    return table(["bf16 model", "weights + master fp32", *names], body)


def exactness():
    """The ways of keeping bf16 weights: held-out answers while all learn and at the end, and what the reward
    measures."""
    report = results("exactness")
    setting = report["setting"]
    body = []
    for r in report["rows"]:
        cells = []
        for scale, digits, unit, figures in (
            (100, 1, "%", r["midway"]),
            (100, 1, "%", r["end"]),
            (1, 4, "", r["log_p"]["end"]),
        ):
            value, error, by, by_error = (
                scale * figures[key] for key in ("mean", "error", "difference", "difference_error")
            )
            cells.append(f"{value:.{digits}f}{unit} ± {error:.{digits}f}")
            cells.append("" if r["way"] == setting["reference"] else f"{by:+.{digits}f} ± {by_error:.{digits}f}")
        body.append([r["way"], *cells])
    after = (
        f"right after {setting['midway']} generations",
        f"right after {setting['generations']}",
        f"log-probability after {setting['generations']}",
    )
    header = [
        f"{setting['seeds']} seeds, ± standard error",
        *(text for title in after for text in (title, f"to {setting['reference']}")),
    ]
    left = "; ".join(
        f"{method} {report[key]['changed']:.0%}, by {report[key]['error_over_step']:.2g} of a step"
        for method, key in (("add then subtract", "add_then_subtract"), ("master None", "master_none"))
    )
    return (
        table(header, body)
        + f"\n\nWeights that a generation of {setting['population']} members changes though nothing is learnt "
        f"(rms of the change): {left}."
    )


def measured_gpus():
    """Everything of the GPUs that were measured."""
    paths = [path for path in sorted(RESULTS.glob("kernels-*.json")) if path.stem != "kernels-cpu"]
    return "\n\n".join(map(of_machine, paths)) or "No GPU has been measured yet."


def of_machine(path):
    """The tables of one result file of kernels.py, and of generation.py's beside it; first what was to be reached."""
    report = json.loads(path.read_text())
    beside = path.with_name(path.name.replace("kernels-", "generation-"))
    wanted = aims(targets.reports(path.parent).get(report["machine"].get("gpu"), {}))
    others = json.loads(beside.read_text()) if beside.exists() else {}
    report = {key: value for key, value in others.items() if key != "left_out"} | report
    parts = {"calls": calls, "rivals": baselines, "tables": launches, "generations": generation, "decodings": decodings}
    return "\n\n".join(filter(None, [wanted, *(make(report) for key, make in parts.items() if report.get(key))]))


def decodings(report):
    """Seconds of one member's long answers, by the way of decoding; a ~ before what was extrapolated."""
    methods = list(dict.fromkeys(r["decoding"] for r in report["decodings"]))
    body = []
    for model, workload in dict.fromkeys((r["model"], r["workload"]) for r in report["decodings"]):
        by = {r["decoding"]: r for r in report["decodings"] if (r["model"], r["workload"]) == (model, workload)}
        if len(by) > 1:
            body.append(
                [
                    model,
                    workload,
                    *(
                        f"{'~' * (not by[method]['answers_measured'])}{by[method]['answers']:.3g}"
                        if method in by
                        else ""
                        for method in methods
                    ),
                ]
            )
    return table(["answers of a member, seconds", "", *methods], body) if body else ""


def aims(kinds):
    """The targets of the GPU kernels, from the reports of one machine."""
    words = {None: "", True: "reached", False: "**missed**"}
    return table(
        ["target on an H200", "", "measured", ""],
        [[what, wanted, value or "not yet", words[reached]] for what, wanted, value, reached in targets.rows(kinds)],
    )


def host():
    """What a call costs its thread, of every machine that bench_calls.py ran on."""
    body = []
    for path in sorted(RESULTS.glob("calls-*.json")):
        rows = [b["extra_info"] for b in json.loads(path.read_text())["benchmarks"] if "thread_us" in b["extra_info"]]
        for backend in dict.fromkeys(r["backend"] for r in rows):
            of = {(r["tensors"], r["base"]): r for r in rows if r["backend"] == backend}
            for key, what in (
                ("thread_us_before_kernel", "before the kernel"),
                ("thread_us", "with it" if backend == "cpu" else "with the launch"),
            ):
                body.append(
                    [
                        f"{backend}, {what}",
                        *(
                            f"{of[case][key]:.0f}" if case in of else ""
                            for case in itertools.product((300, 2000), (False, True))
                        ),
                    ]
                )
    header = [
        "a call on a ParamTable, us of its thread",
        "300 tensors, in place",
        "from a base",
        "2000 tensors, in place",
        "from a base",
    ]
    return table(header, [["wanted, before the kernel", "100", "100", "250", "250"], *body])


def unreached():
    """The targets, where no GPU was measured."""
    return "" if targets.reports(RESULTS) else aims({})


def variants():
    """Of each variant of the CUDA kernels what it changes in the counted instructions; and on every GPU measured, in
    time."""
    report = results("variants")
    shipped = {row["kernel"]: row for row in report["counts"] if row["variant"] == "as shipped"}
    body = []
    for name in dict.fromkeys(row["variant"] for row in report["counts"]):
        rows = [row for row in report["counts"] if row["variant"] == name]
        cells = [
            _counted(row, shipped[row["kernel"]], name)
            for row in rows
            if name == "as shipped" or not _alike(row, shipped[row["kernel"]])
        ]
        body.append([name, report["expected"].get(name, ""), "; ".join(cells) or "as shipped"])
    parts = [table(["variant", "expected", f"instructions a value on {report['arch']} (registers)"], body)]
    for path in sorted(RESULTS.glob("variants-*.json")):
        timed = json.loads(path.read_text())
        operations = list(dict.fromkeys(row["operation"] for row in timed["rows"]))
        body = []
        for backend, name in dict.fromkeys((row["backend"], row["variant"]) for row in timed["rows"]):
            times = {
                row["operation"]: row for row in timed["rows"] if (row["backend"], row["variant"]) == (backend, name)
            }
            body.append([backend, name, *(_times(times.get(operation)) for operation in operations)])
        parts.append(table([f"times what ships, {timed['machine']['gpu']}", "", *operations], body))
    return "\n\n".join(parts)


def _alike(a, b):
    return all(a[key] == b[key] for key in ("instructions_per_value", "registers", "spill_bytes"))


def _counted(row, shipped, name):
    before = "" if name == "as shipped" else f"{shipped['instructions_per_value']:.2f} → "
    spilled = f", {row['spill_bytes']} B spilled" if row["spill_bytes"] else ""
    return f"{row['kernel']} {before}{row['instructions_per_value']:.2f} ({row['registers']}{spilled})"


def _times(row):
    return "" if row is None else row["error"] if "error" in row else f"{row['times_shipped']:.3f}"


def learning_runs():
    """The whole runs of countdown_run.py, one row a machine."""
    body = []
    for path in sorted(RESULTS.glob("countdown-*.json")):
        r = json.loads(path.read_text())
        facts, summary = r["machine"], r["summary"]
        exact = f"{summary['base']:.1%} → {summary['final']:.1%}"
        reward = " → ".join(f"{value:.3f}" for value in r["reward"])
        share = f"{r['shares']['outside generation']:.1%}" if r["shares"] else ""
        times = [reward, f"{r['seconds_a_generation'] or 0:.1f} s", share]
        model = r["model"].get("base") or "{parameters:,} parameters, pre-trained for {seconds:.0f} s".format(
            **r["model"]
        )
        same = "the same bits" if r["replays_equal_the_run"] else "**other bits**"
        replays = ", ".join(f"{where} {replay['seconds']:.0f} s" for where, replay in r["replays"].items())
        body.append(
            [
                facts.get("gpu", facts["processor"]),
                model,
                f"{r['sigma']:g}",
                str(summary["generations"]),
                exact,
                *times,
                f"{replays}: {same}",
            ]
        )
    header = [
        "Countdown",
        "model",
        "sigma = lr",
        "generations",
        "held-out exact",
        "members' reward",
        "a generation",
        "of it outside generating",
        "replays",
    ]
    return table(header, body) if body else "No such run was made on a GPU yet."


def sass():
    rows = [
        r
        for r in results("static_analysis")["rows"]
        if r["arch"] == "sm_90"
        and "stochastic" not in r["kernel"]
        and "f16 <-" not in r["kernel"].replace("bf16 <-", "")
    ]
    rows = [r for r in rows if not r["kernel"].endswith("<- f16")]
    pipes = ["FMA", "ALU", "IMAD.WIDE", "LSU", "uniform", "control"]
    body = [
        [
            r["kernel"],
            f"{r['instructions_per_value']:.2f}",
            *(f"{r['per_value'].get(p, 0):.2f}" for p in pipes),
            str(r["registers"]),
            str(r["spill_bytes"]),
        ]
        for r in rows
    ]
    return table(["kernel (out <- base)", "instructions a value", *pipes, "registers", "bytes spilled"], body)


def predicted():
    """Of the main kernels: share of a copy or normals a second, what binds, and the measurement beside it where there
    is one."""
    rows = results("static_analysis")["predictions"]
    kernels = [
        f"{triton}{kernel}"
        for triton in ("", "triton ")
        for kernel in ("perturb f32 <- f32", "perturb bf16 <- f32", "perturb bf16 <- bf16", "update")
        + ("perturb rank 1 bf16 <- bf16", "update rank 1")
    ]
    kernels += ["swap bf16 <- bf16", "fingerprint bf16"]
    names = list(dict.fromkeys(r["gpu"] for r in rows))
    cells = {(r["gpu"], r["kernel"]): _predicted_cell(r) for r in rows}
    return table(["predicted", *names], [[kernel, *(cells[name, kernel] for name in names)] for kernel in kernels])


def _predicted_cell(row):
    """Of what binds, and how busy the busiest of the others is."""
    p = row["predicted"]
    name, busy = max(((name, busy) for name, busy in p["busy"].items() if name != p["binds"]), key=lambda pair: pair[1])
    text = f"{_reach(p)}: {p['binds']} (then {name}, {busy:.0%} busy)"
    return text + (f"; measured {_reach(row['measured'])}" if "measured" in row else "")


def _reach(figures):
    return f"{figures['share_of_copy']:.0%}" if "share_of_copy" in figures else f"{figures['normals_per_s']:.3g} / s"


def noise():
    return table(
        ["", "over all 2^32 words, the worse of x and y"], [[k, f"{v:.4g}"] for k, v in results("noise").items()]
    )


def noise_stats():
    report = results("noise_stats")
    normals, words = report["normals"], report["words"]
    if isinstance(words, str):
        battery = words
    else:
        orders = list(dict.fromkeys(row["order"] for row in words))
        p = [row["p"] for row in words]
        battery = (
            f"{len(p)} p-values ({', '.join(orders)}), {min(p):.3f} to {max(p):.5f}; Bonferroni p of the most extreme "
            f"{min(1, report['bonferroni']['words']):.3f}"
        )
    rows = [
        [
            "normals",
            f"{report['values']:.3g} from the CPU kernel: {len(normals)} statistics, the largest "
            f"{max(abs(row['z']) for row in normals if row['z'] is not None):.2f} standard errors away",
        ],
        ["the law's own distance to N(0, 1)", f"{report['law']['distance_to_normal']:.3g}"],
        [
            "correlation of x² and y² in a pair",
            f"{report['law']['pair_correlation_of_squares']:.4f} by enumeration (0 in exact Box-Muller)",
        ],
        ["raw words, dieharder", battery],
    ]
    return table(["against the exact law of the transform", ""], rows)


def learning():
    report = results("learning")
    body = []
    for r in report["rows"]:
        difference = f"{100 * r['difference']:+.1f} ± {100 * r['difference_error']:.1f} to {r['reference']}"
        body.append(
            [r["option"], f"{r['final']:.1%} ± {r['error']:.1%}", "" if r["reference"] == r["option"] else difference]
        )
    header = [f"{report['seeds']} seeds, mean ± standard error", "held-out exact", "points, paired by seed"]
    return table(header, body)


def scale():
    """For a model of 7B: what one worker receives and how long its update takes, beside sending it the weights; and
    efficiency in simulation."""
    report = results("scale")
    model = next(r for r in report["paper"] if r["model"] == report["assumed"]["model"])
    rows = []
    for r in _wire(report):
        n = r["population"]
        by = {s["policy"]: f"{s['efficiency']:.0%}" for s in report["simulated"] if s["workers"] == r["workers"]}
        cells = [_sent(r["torchrun_rank_receives"]), _sent(r["ray_worker_receives"]), _sent(model["weights_bytes"])]
        cells += [_long(model["update_seconds_h200_predicted"]["1"][str(n)]), _long(model["weights_seconds"])]
        rows.append(
            [f"{r['workers']}, {n}", *cells, *(by[policy] for policy in ("waves", "shared counter", "re-issued"))]
        )
    link = f"weights at {report['assumed']['link_bytes_a_second'] / 1e9:.0f} GB/s (assumed)"
    header = ["workers, N", "scores: torchrun", "coefficients: Ray", "weights", "update, H200 (predicted)", link]
    return table([*header, "waves (simulated)", "shared counter (simulated)", "re-issued (simulated)"], rows)


def _wire(report):
    """The rows of the populations that are simulated."""
    return [r for r in report["wire"] if r["members_a_worker"] == report["assumed"]["members_a_worker"]]


def _sent(n):
    return f"{n / 1e3:.2g} kB" if n < 1e5 else f"{n / 1e6:.2g} MB" if n < 1e8 else f"{n / 1e9:.4g} GB"


def _long(seconds):
    return f"{seconds:.2g} s" if seconds < 99.5 else f"{seconds:.0f} s"


def scale_wire():
    report = results("scale")
    keys = ("torchrun_rank_receives", "ray_driver_receives", "ray_worker_receives")
    rows = [[str(r["workers"]), str(r["population"]), *(_sent(r[key]) for key in keys)] for r in report["wire"]]
    return table(
        ["workers", "N", "torchrun: every rank receives", "Ray: the driver receives", "Ray: every worker receives"],
        rows,
    )


def scale_models():
    report = results("scale")
    rows = []
    for r in report["paper"]:
        memory = [_bytes(r["memory_bytes"][master]) for master in ("fp32", "copy", "none")]
        whole, sharded = (r["update_seconds_h200_predicted"][shards] for shards in ("1", "8"))
        update = [_long(r["update_seconds_cpu"]["30"])]
        update += [*(_long(whole[n]) for n in ("30", "256", "1024", "4096")), _long(sharded["1024"])]
        rows.append([r["model"], *memory, _bytes(r["weights_bytes"]), _long(r["weights_seconds"]), *update])
    h200 = [f"{'update, H200 (predicted), ' if n == 30 else ''}N = {n}" for n in (30, 256, 1024, 4096)]
    header = [
        "model",
        "memory, master fp32",
        "copy",
        "none",
        "weights",
        f"at {report['assumed']['link_bytes_a_second'] / 1e9:.0f} GB/s (assumed)",
    ]
    header += [
        f"update, CPU of {report['unit_costs']['cpu_threads']} threads, N = 30",
        *h200,
        "N = 1024 over 8 H200 (predicted)",
    ]
    return table(header, rows)


def scale_simulated():
    report = results("scale")
    a = report["assumed"]
    said = (
        f"Assumed: {a['generations']} generations of {a['members_a_worker']} members a worker; a member takes "
        f"{a['seconds']:.0f} s "
        f"(its logarithm spreads by {a['spread']}), {a['stragglers']:.0%} of them {a['straggle']:.0f} times as long; "
        f"a worker dies every {a['hours_between_failures']:.0f} hours and is back after {a['replaced_after']:.0f} s "
        f"and the log's updates, which take what is predicted for {a['model']}; late after {a['limit']:.0f} s."
    )
    rows = []
    for r in report["simulated"]:
        counts = [str(r[key]) for key in ("dropped", "repeated", "deaths")]
        rows.append(
            [
                str(r["workers"]),
                str(r["population"]),
                r["policy"],
                f"{r['efficiency']:.1%}",
                f"{r['wasted']:.1%}",
                *counts,
            ]
        )
    header = [
        "simulated: workers",
        "N",
        "policy",
        "efficiency",
        "wasted",
        "members dropped",
        "handed out again",
        "deaths",
    ]
    return f"{said}\n\n" + table(header, rows)


def scale_varied():
    report = results("scale")
    workers = report["varied"][0]["workers"]
    rows = [{"what": "as above", **r} for r in report["simulated"] if r["workers"] == workers] + report["varied"]
    policies = list(dict.fromkeys(r["policy"] for r in rows))
    by = {(r["what"], r["policy"]): f"{r['efficiency']:.1%}" for r in rows}
    header = [f"efficiency of {workers} workers, simulated", *policies]
    return table(
        header, [[what, *(by[what, policy] for policy in policies)] for what in dict.fromkeys(r["what"] for r in rows)]
    )


def buys():
    """What a user gains over a plain loop, one figure of each kind, and the page that has the others."""
    kernels, drift = results("kernels-cpu"), results("exactness")
    members_, scale_, demo = results("members-cpu"), results("scale"), results("demo")
    end = {r["way"]: r["end"]["mean"] for r in drift["rows"]}
    loop, ours = "es-at-scale", "es_kernels, master fp32"
    times = {(r["model"], r["what"], r["who"]): r for r in kernels["rivals"]}
    member = [times["Qwen2.5-0.5B", "member", who] for who in (loop, ours)]
    without = times["Qwen2.5-0.5B", "member", "es_kernels, master None"]
    exact = next(r["fp32"]["bytes"] for r in results("generation-cpu")["memory"] if r["model"] == "Qwen2.5-0.5B")
    update = [times["50M", "update", who] for who in (loop, ours)]
    batch = next(r for r in members_["rows"] if "PEFT takes" in r)
    speeds = [f"{batch['ways'][way]['tokens_per_s']:.0f} tokens / s" for way in ("one by one", "one batch")]
    wire, model = _wire(scale_)[0], next(r for r in scale_["paper"] if r["model"] == scale_["assumed"]["model"])
    changed = f"{drift['add_then_subtract']['changed']:.0%} of weights changed a generation, though nothing is learnt"
    rows = [
        [
            "perturb and restore a member of Qwen2.5-0.5B, bf16, on a CPU",
            f"{member[0]['seconds']:.2g} s, {_bytes(member[0]['peak_extra_bytes'])} extra",
            f"{member[1]['seconds']:.2g} s with exact weights beside it, {_bytes(exact)}; {without['seconds']:.2g} s "
            f"with {_bytes(without['peak_extra_bytes'])} extra",
            "guides/masters.md",
        ],
        [
            f"update by {update[0]['seeds']} members, 50M weights, on a CPU",
            *(f"{r['seconds']:.2g} s, {_bytes(r['peak_extra_bytes'])} extra" for r in update),
            "results/kernels.md",
        ],
        ["undo a perturbation in bf16", changed, "exact", "guides/masters.md"],
        [
            f"learn in bf16, embedded model: right answers after {drift['setting']['generations']} generations",
            *(f"{end[way]:.0%}" for way in ("bf16, add then subtract", "bf16, master fp32")),
            "results/learning.md",
        ],
        [
            f"answer {batch['prompts']} questions by {batch['members']} members of {batch['model']}, noise of rank "
            f"{members_['noise_rank']}, on a CPU",
            f"one by one: {speeds[0]}",
            f"in one batch: {speeds[1]}, {batch['share_of_plain']:.0%} of plain inference",
            "guides/members.md",
        ],
        [
            "resume after `kill -9`, go back to any generation",
            "a checkpoint each",
            f"one log of {demo['log_bytes'] / 1e3:.0f} kB for the demo's {demo['generations']}; the same bits",
            "guides/resume.md",
        ],
        [
            f"keep {wire['workers']} workers of a 7B model in step (computed, not measured)",
            f"{_sent(model['weights_bytes'])} of weights a generation",
            f"{_sent(wire['torchrun_rank_receives'])} of scores; fingerprints prove it",
            "guides/workers.md",
        ],
        ["the same noise on every device, shard and thread count", "no", "yes, to the bit", "../es_kernels/NOISE.md"],
    ]
    body = [[*cells, f"[more](docs/{page})".replace("docs/../", "")] for *cells, page in rows]
    return table(["", "a plain loop", "es-kernels", ""], body)


def paper():
    """The experiments of which the paper gives a figure before and after. None of them was run here yet."""
    body = []
    for path in sorted((ROOT / "python/es_finetune/configs").glob("*.yaml")):
        text = path.read_text()
        reported = re.search(r"The paper reports ([\d.]+) % .*before and ([\d.]+) % after", text)
        if reported:
            body.append([f"`{path.stem}`", f"{reported[1]} %", f"{reported[2]} %", "not run"])
    return table(["config", "paper: before", "paper: after ES", "ours"], body)


TABLES = {
    "buys": buys,
    "paper": paper,
    "scale": scale,
    "scale-wire": scale_wire,
    "scale-models": scale_models,
    "scale-simulated": scale_simulated,
    "scale-varied": scale_varied,
    "cpu": cpu,
    "rivals": baselines,
    "generation": generation,
    "countdown": countdown,
    "memory": memory,
    "hours": hours,
    "host": host,
    "low-rank": low_rank,
    "members": members,
    "conciseness": conciseness,
    "countdown-smollm2": countdown_smollm2,
    "countdown-smollm2-examples": countdown_smollm2_examples,
    "short-answers": short_answers,
    "short-answers-examples": short_answers_examples,
    "short-answers-methods": short_answers_methods,
    "short-answers-grpo": short_answers_grpo,
    "gpus": measured_gpus,
    "targets": unreached,
    "learning-runs": learning_runs,
    "variants": variants,
    "exactness": exactness,
    "learning": learning,
    "noise": noise,
    "noise-stats": noise_stats,
    "sass": sass,
    "predicted": predicted,
}


def filled(text):
    for name, make in TABLES.items():
        block = make() + "\n"
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, block=block: m[1] + block + m[2], text, flags=re.S
        )
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--tables", type=pathlib.Path, metavar="FOLDER")
    args = parser.parse_args()
    if args.tables:
        print("\n\n".join(map(of_machine, sorted(args.tables.glob("kernels-*.json")))))
        return
    for name in PAGES:
        text = (ROOT / name).read_text()
        if not args.check:
            (ROOT / name).write_text(filled(text))
        elif filled(text) != text:
            sys.exit(f"{name} differs from bench/results: run python -m bench.publish.tables")


if __name__ == "__main__":
    main()
