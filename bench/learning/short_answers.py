"""What demo-llm teaches a real language model: its run, by the command line, with several seeds.

    python -m bench.learning.short_answers [--seeds 3] [--processes 2] [--device cpu|cuda] [--out bench/results]

Writes short_answers-cpu.json or short_answers-GPU.json.

Of each kind of held-out question: how many answers are the reference before and after, and how many hold it somewhere.
The second says what the model knows: answers that it does not know it was not taught. A seed decides the members' noise
and the questions of each generation. Every run has one CPU thread, and as many run at once as there are --processes. A
seed whose run is in --work (runs/short-answers) already is not run again.
"""

import argparse
import itertools
import json
import multiprocessing.pool
import os
import pathlib
import statistics
import subprocess
import sys

import torch

from bench import RESULTS, ROOT
from bench.common import environment, smollm2
from es_finetune.runs.files import write_atomically
from es_finetune.tasks.short_answers import TEST, TRAIN, ShortAnswers

CONFIG = "short-answers-smollm2-135m"
WHEN = ("base", "tuned")


def train(folder, seed, device):
    """A run as `make demo-llm` makes it, on one thread, and what it took of the machine."""
    flags = ["--config", CONFIG, "--model", smollm2.FOLDER, "--seed", seed, "--output", folder, "--overwrite"]
    flags += ["--device", device, "--threads", 1, "--save_model", "false"]
    command = [sys.executable, "-m", "es_finetune", "train", *flags]
    process = subprocess.Popen(list(map(str, command)))
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the run with seed {seed} failed")
    resources = {"cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_memory_bytes": usage.ru_maxrss * 1024}
    (folder / "resources.json").write_text(json.dumps(resources))


def outcome(folder):
    """What is kept of a run."""
    summary = json.loads((folder / "summary.json").read_text())
    evals, rows = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("evals", "metrics")
    )
    until = [0.0, *itertools.accumulate(row["seconds"] for row in rows)]
    return {
        "seed": summary["seed"],
        "base": summary["base"],
        "final": summary["final"],
        "curve": [[until[row["generation"]], row["generation"], row["exact"], row["format"]] for row in evals],
        "kinds": kinds(folder),
        "examples": examples(folder),
        "seconds": summary["seconds_total"],
        "live": summary["live"],
        **json.loads((folder / "resources.json").read_text()),
    }


def answers(folder, when):
    """{question: answer} to the held-out questions."""
    lines = map(json.loads, (folder / "answers" / f"{when}.jsonl").read_text().splitlines())
    return {line["prompt"][-1]["content"]: line["completion"] for line in lines}


def kinds(folder):
    """Of each kind of question the number, and of these before and after: exact answers, and answers that hold the
    reference."""
    task, rows = ShortAnswers(), []
    written = {when: answers(folder, when) for when in WHEN}
    for kind, pairs in TEST.items():
        items = [item for item in task.test if item.key in {kind.format(subject) for subject in subjects(pairs)}]
        row = {"kind": kind, "trained": kind in TRAIN, "questions": len(items)}
        for when in WHEN:
            texts = [(item, written[when][item.key]) for item in items]
            row[f"{when} exact"] = sum(int(task.score(item, text).exact) for item, text in texts)
            row[f"{when} holds"] = sum(item.data.casefold() in text.casefold() for item, text in texts)
        rows.append(row)
    return rows


def subjects(pairs):
    return [pair.split()[0].replace("_", " ") for pair in pairs.split(",")]


def examples(folder):
    """[question, answer before, answer after] of the first two of each kind."""
    base, tuned = (answers(folder, when) for when in WHEN)
    asked = [kind.format(subject) for kind, pairs in TEST.items() for subject in subjects(pairs)[:2]]
    return [[question, base[question], tuned[question]] for question in asked]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "runs/short-answers")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args()
    smollm2.fetch()
    folders = [args.work / str(seed) for seed in range(args.seeds)]
    todo = [
        (folder, seed, args.device) for seed, folder in enumerate(folders) if not (folder / "resources.json").exists()
    ]
    with multiprocessing.pool.ThreadPool(args.processes) as pool:
        pool.starmap(train, todo)
    runs = [outcome(folder) for folder in folders]
    for run in runs:
        print(f"seed {run['seed']}: {run['base']:.1%} -> {run['final']:.1%} in {run['seconds']:.0f} s")
    gain = statistics.mean(run["final"] - run["base"] for run in runs)
    print(f"mean gain {100 * gain:.1f} points, least {100 * min(run['final'] - run['base'] for run in runs):.1f}")
    facts = environment.describe(args.device)
    report = {"machine": facts, "config": CONFIG, "model": smollm2.PACKAGE, "runs": runs}
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out / f"short_answers-{environment.slug(facts)}.json", json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
