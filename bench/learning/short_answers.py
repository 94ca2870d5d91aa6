"""What demo-llm teaches a real language model: its run, by the command line, with several seeds.

    python -m bench.learning.short_answers [--seeds 3] [--processes 2] [--threads 1] [--device cpu|cuda] [--out FOLDER]

Writes short_answers-cpu.json or short_answers-GPU.json.

Of each kind of held-out question: how many answers are the reference before and after, and how many hold it somewhere.
The second says what the model knows: answers that it does not know it was not taught. Every run has --threads, and as
many run at once as there are --processes. A seed whose run is in --work (runs/short-answers) already is not run again.
"""

import argparse
import json
import pathlib
import statistics

import torch

from bench import RESULTS, ROOT
from bench.common import environment, smollm2
from bench.learning import seeds
from es_finetune.runs.files import read_rows, write_atomically
from es_finetune.tasks.short_answers import TEST, TRAIN, ShortAnswers

CONFIG = "short-answers-smollm2-135m"
WHEN = ("base", "tuned")


def answers(folder, when):
    """{question: answer} to the held-out questions."""
    lines = read_rows(folder / "answers" / f"{when}.jsonl")
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
    seeds.add_flags(parser, processes=2, threads=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "runs/short-answers")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args()
    folders = seeds.trained(CONFIG, args.work, args, args.device)
    runs = [seeds.outcome(folder) | {"kinds": kinds(folder), "examples": examples(folder)} for folder in folders]
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
