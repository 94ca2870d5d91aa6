"""The paper's Countdown on a real language model that a CPU can carry: what happens to the form and to the answers.

    python -m bench.learning.countdown_smollm2 [--seeds 3] [--processes 1] [--threads 2] [--json FILE]

Writes countdown_smollm2-cpu.json. The runs are those of `es-finetune train --config countdown-smollm2-135m`. Of the
held-out answers before and after it counts how far each comes: it ends its thoughts, holds an answer block, that block
is an expression, of just the given numbers, and the target. A seed whose run is in --work (runs/countdown-smollm2)
already is not run again.
"""

import argparse
import json
import pathlib

from bench import RESULTS, ROOT
from bench.common import environment, smollm2
from bench.learning import seeds
from es_finetune.runs.files import read_rows, write_atomically
from es_finetune.tasks.arithmetic import evaluate
from es_finetune.tasks.countdown import OPENED, Countdown
from es_finetune.tasks.extract import last_block

CONFIG = "countdown-smollm2-135m"
SHOWN = 3  # questions whose answers are kept


def answers(folder, when):
    """{prompt: answer} to the held-out questions, "base" or "tuned"."""
    return {line["prompt"]: line["completion"] for line in read_rows(folder / "answers" / f"{when}.jsonl")}


def counts(written):
    """How many of the answers, {prompt: answer}, come so far."""
    task = Countdown()
    items = {item.prompt: item for item in task.test}
    far = dict.fromkeys(
        ("answers", "end of thoughts", "answer block", "whole form", "expression", "its numbers", "exact"), 0
    )
    for prompt, text in written.items():
        item, score = items[prompt], task.score(items[prompt], text)
        block = last_block(OPENED + text, "answer")
        value = evaluate(block.strip()) if block is not None else None
        far["answers"] += 1
        far["end of thoughts"] += last_block(OPENED + text, "think") is not None
        far["answer block"] += block is not None
        far["whole form"] += score.format == 1
        far["expression"] += value is not None
        far["its numbers"] += value is not None and tuple(sorted(value[1])) == item.key[0]
        far["exact"] += int(score.exact)
    return far


def kept(folder):
    """What is kept of a run."""
    written = {when: answers(folder, when) for when in ("base", "tuned")}
    steps = [
        [row["seconds"], row["reward_mean"], row["format_mean"], row["exact_mean"], row["tokens"]]
        for row in read_rows(folder / "metrics.jsonl")
    ]
    examples = [[prompt, *(of[prompt] for of in written.values())] for prompt in list(written["base"])[:SHOWN]]
    return seeds.outcome(folder) | {
        "generations": steps,
        "counts": {when: counts(of) for when, of in written.items()},
        "examples": examples,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    seeds.add_flags(parser, processes=1, threads=2)
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "runs/countdown-smollm2")
    parser.add_argument("--json", type=pathlib.Path, default=RESULTS / "countdown_smollm2-cpu.json")
    args = parser.parse_args()
    runs = [kept(folder) for folder in seeds.trained(CONFIG, args.work, args)]
    for run in runs:
        print(f"seed {run['seed']}, {run['seconds']:.0f} s: {run['counts']['base']} -> {run['counts']['tuned']}")
    report = {
        "machine": environment.describe("cpu"),
        "config": CONFIG,
        "model": smollm2.PACKAGE,
        "threads": args.threads,
    }
    write_atomically(args.json, json.dumps(report | {"runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
