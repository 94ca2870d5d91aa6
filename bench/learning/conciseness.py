"""What members in one batch are worth by the clock: the paper's conciseness on a real language model, by full noise one
member after the other and by noise of rank 1 with all members in one batch.

    python -m bench.learning.conciseness MODEL [--seconds 600] [--seeds 1] [--processes 2] [--json
    bench/results/conciseness-cpu.json]

MODEL is a folder, such as SmolLM2-135M-Instruct in f32. Two questions to train on and up to 100 tokens an answer
(es_finetune/tasks/conciseness.py), 30 members; reward: minus the distance of the answer's length from the shortest
right one's. Every run has the same seconds of generations, on one CPU thread, and as many run at once as there are
--processes; held-out answers, sampled before and after, are not counted. sigma and lr are the same for both ways, and
above the paper's, which are for models of 10 to 50 times as many weights.
"""

import argparse
import concurrent.futures
import contextlib
import io
import itertools
import json
import multiprocessing
import pathlib
import tempfile

from bench import RESULTS
from bench.common import environment
from es_finetune import TrainConfig, Trainer
from es_finetune.monitor.callbacks import Callback
from es_finetune.runs.files import write_atomically

SIGMA = LR = 0.005
POPULATION, PROMPTS = 30, 2
WAYS = {
    "full noise, one by one": {},
    "rank 1, one batch": {"noise_rank": 1, "batch_size": POPULATION * PROMPTS},
}


class Deadline(Callback):
    """Ends a run after so many seconds of generations."""

    def __init__(self, seconds):
        self.seconds = seconds

    def on_generation(self, trainer, row):
        if sum(row["seconds"] for row in trainer.rows) > self.seconds:
            trainer.stop()


def run(way, seed, model, seconds):
    """One run: its generations by the clock, and the held-out reward before and after."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config = TrainConfig(
            model=model,
            task="conciseness",
            output=f"{folder}/run",
            seed=seed,
            sigma=SIGMA,
            lr=LR,
            population=POPULATION,
            generations=10**4,
            threads=1,
            eval_every=0,
            health_every=0,
            save_model=False,
            report_to=["none"],
            **WAYS[way],
        )
        trainer = Trainer(config, callbacks=[Deadline(seconds)])
        summary = trainer.train()
    clock = itertools.accumulate(row["seconds"] for row in trainer.rows)
    generations = [
        {"until": until, "reward": row["reward_mean"], "best": row["reward_max"], "tokens": row["tokens"]}
        for until, row in zip(clock, trainer.rows, strict=True)
    ]
    return {"way": way, "seed": seed, "generations": generations, "base": summary["base"], "final": summary["final"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].replace("\n", " "))
    parser.add_argument("model", help="folder of a chat model")
    parser.add_argument("--seconds", type=float, default=600, help="of generations, each run")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=pathlib.Path, default=RESULTS / "conciseness-cpu.json")
    args = parser.parse_args()
    jobs = [(way, seed) for seed in range(args.seeds) for way in WAYS]
    content = {
        "machine": environment.describe("cpu"),
        "model": pathlib.Path(args.model).name,
        "setting": {"sigma": SIGMA, "lr": LR, "population": POPULATION, "prompts": PROMPTS, "seconds": args.seconds},
        "processes": args.processes,
        "runs": [],
    }
    spawn = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with concurrent.futures.ProcessPoolExecutor(args.processes, mp_context=spawn) as pool:
        futures = [pool.submit(run, way, seed, args.model, args.seconds) for way, seed in jobs]
        for future in concurrent.futures.as_completed(futures):
            row = future.result()
            content["runs"] = sorted([*content["runs"], row], key=lambda r: (r["seed"], r["way"]))
            last = row["generations"][-1]
            print(
                f"{row['way']}, seed {row['seed']}: {len(row['generations'])} generations in {last['until']:.0f} s, "
                f"held-out reward {row['base']:.0f} -> {row['final']:.0f}",
                flush=True,
            )
            write_atomically(args.json, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
