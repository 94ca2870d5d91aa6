"""What members in one batch are worth by the clock: the paper's conciseness on a real language model, by full noise one
member after the other and by noise of rank 1 with all members in one batch.

    python -m bench.learning.conciseness [--seconds 600] [--seeds 3] [--processes 2] [--work runs/conciseness]
                                         [--json conciseness-cpu.json]

The runs are those of `es-finetune train --config conciseness-smollm2-135m`: two questions to train on, 30 members, up
to 100 tokens an answer. Every run has the same seconds of generations, on one CPU thread, and as many run at once as
there are --processes. Held out are 8 questions with 20 sampled answers each, before and after; they are not counted.
A run that is in --work already is not made again.
"""

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import pathlib

import yaml

from bench import RESULTS, ROOT
from bench.common import environment, smollm2
from es_finetune import TrainConfig, Trainer, evaluate
from es_finetune.cli import CONFIGS
from es_finetune.monitor.callbacks import Callback
from es_finetune.runs.files import write_atomically

CONFIG = yaml.safe_load((CONFIGS / "conciseness-smollm2-135m.yaml").read_text())
WAYS = {"full noise, one by one": {"noise_rank": 0}, "rank 1, one batch": {}}


class Deadline(Callback):
    """Ends a run after so many seconds of generations."""

    def __init__(self, seconds):
        self.seconds = seconds

    def on_generation(self, trainer, row):
        if sum(row["seconds"] for row in trainer.rows) > self.seconds:
            trainer.stop()


def run(job):
    """One run: its generations by the clock, and its model on the held-out questions."""
    folder, way, seed, seconds = job
    # Of the run's own evals one question is enough: `evaluate` asks all of them, and measures the divergence too.
    options = {"seed": seed, "threads": 1, "eval_items": 1, "save_model": False, "report_to": ["none"]}
    config = TrainConfig(
        **CONFIG | WAYS[way] | options | {"output": str(folder), "generations": 10**4, "overwrite": True}
    )
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(config, callbacks=[Deadline(seconds)])
        trainer.train()
        held_out = evaluate(run=str(folder), output=str(folder / "eval"), kl=True)
    clock = itertools.accumulate(row["seconds"] for row in trainer.rows)
    generations = [
        {"until": until, "reward": row["reward_mean"], "best": row["reward_max"], "tokens": row["tokens"]}
        for until, row in zip(clock, trainer.rows, strict=True)
    ]
    kept = {name: held_out[name] for name in ("kl", "kl_standard_error", "tokens")}
    row = {"way": way, "seed": seed, "generations": generations, "final": held_out["value"], **kept}
    write_atomically(folder / "row.json", json.dumps(row) + "\n")
    return row


def base(folder):
    """The base model on the held-out questions."""
    path = folder / "base" / "result.json"
    if not path.exists():
        evaluate(model=CONFIG["model"], task=CONFIG["task"], output=str(path.parent), batch_size=CONFIG["batch_size"])
    return json.loads(path.read_text())["value"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].replace("\n", " "))
    parser.add_argument("--seconds", type=float, default=600, help="of generations, each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "runs/conciseness")
    parser.add_argument("--json", type=pathlib.Path, default=RESULTS / "conciseness-cpu.json")
    args = parser.parse_args()
    smollm2.fetch()
    folders = {
        (way, seed): args.work / f"rank-{(CONFIG | WAYS[way])['noise_rank']}-seed-{seed}"
        for seed in range(args.seeds)
        for way in WAYS
    }
    todo = [(folder, *job, args.seconds) for job, folder in folders.items() if not (folder / "row.json").exists()]
    # A process of its own for each run: torch's threads do not survive a fork
    with multiprocessing.get_context("spawn").Pool(args.processes, maxtasksperchild=1) as pool:
        for row in pool.imap_unordered(run, todo):
            last = row["generations"][-1]
            print(
                f"{row['way']}, seed {row['seed']}: {len(row['generations'])} generations in {last['until']:.0f} s, "
                f"held-out reward {row['final']:.0f}, KL {row['kl']:.3f}",
                flush=True,
            )
    content = {
        "machine": environment.describe("cpu"),
        "model": pathlib.Path(CONFIG["model"]).name,
        "setting": {name: CONFIG[name] for name in ("sigma", "lr", "population")} | {"seconds": args.seconds},
        "processes": args.processes,
        "base": base(args.work),
        "runs": [json.loads((folder / "row.json").read_text()) for folder in folders.values()],
    }
    write_atomically(args.json, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
