"""What demo-llm teaches a real language model: its run, by the command line, with several seeds.

    python -m bench.learning.short_answers [--seeds 3] [--work runs/short-answers] [--json short_answers.json]

Of each kind of held-out question: how many answers are the reference before and after, and how many hold it somewhere.
The second says what the model knows: answers that it does not know it was not taught. A seed decides the members' noise
and the questions of each generation. A seed whose run is in --work already is not run again.
"""

import argparse
import json
import pathlib
import resource
import statistics
import subprocess
import sys

from bench import RESULTS, ROOT
from bench.common import environment, smollm2
from es_finetune.runs.files import write_atomically
from es_finetune.tasks.short_answers import TEST, TRAIN, ShortAnswers

CONFIG = "short-answers-smollm2-135m"
WHEN = ("base", "tuned")


def train(folder, seed):
    """A run as `make demo-llm` makes it, and the CPU seconds that it took."""
    begin = resource.getrusage(resource.RUSAGE_CHILDREN)
    flags = ["--config", CONFIG, "--model", smollm2.FOLDER, "--seed", seed, "--output", folder]
    command = [sys.executable, "-m", "es_finetune", "train", *flags, "--save_model", "false", "--overwrite"]
    subprocess.run(list(map(str, command)), check=True)
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    (folder / "cpu_seconds").write_text(str(end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime))


def outcome(folder):
    """What is kept of a run."""
    summary = json.loads((folder / "summary.json").read_text())
    evals = [json.loads(line) for line in (folder / "evals.jsonl").read_text().splitlines()]
    return {
        "seed": summary["seed"],
        "base": summary["base"],
        "final": summary["final"],
        "curve": [[row["generation"], row["exact"], row["reward"]] for row in evals],
        "format": [evals[0]["format"], evals[-1]["format"]],
        "kinds": kinds(folder),
        "examples": examples(folder),
        "seconds": summary["seconds_total"],
        "cpu_seconds": float((folder / "cpu_seconds").read_text()),
        "live": summary["live"],
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
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "runs/short-answers")
    parser.add_argument("--json", type=pathlib.Path, default=RESULTS / "short_answers.json")
    args = parser.parse_args()
    smollm2.fetch()
    folders = [args.work / str(seed) for seed in range(args.seeds)]
    for seed, folder in enumerate(folders):
        if not (folder / "cpu_seconds").exists():
            train(folder, seed)
    runs = [outcome(folder) for folder in folders]
    for run in runs:
        print(f"seed {run['seed']}: {run['base']:.1%} -> {run['final']:.1%} in {run['seconds']:.0f} s")
    gain = statistics.mean(run["final"] - run["base"] for run in runs)
    print(f"mean gain {100 * gain:.1f} points, least {100 * min(run['final'] - run['base'] for run in runs):.1f}")
    report = {"machine": environment.describe("cpu"), "config": CONFIG, "model": smollm2.PACKAGE, "runs": runs}
    write_atomically(args.json, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
