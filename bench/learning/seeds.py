"""Runs of a ready config on SmolLM2 by the command line, with several seeds, and what is kept of each.

A seed decides the members' noise and the questions of each generation.
"""

import itertools
import json
import multiprocessing.pool
import os
import subprocess
import sys

from bench.common import smollm2
from es_finetune.runs.files import read_rows


def add_flags(parser, processes, threads):
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=processes, help="runs at once")
    parser.add_argument("--threads", type=int, default=threads, help="of a run")


def trained(config, work, args, device="cpu"):
    """The folders of the runs, a seed each; one that is in `work` already is not made again."""
    smollm2.fetch()
    folders = [work / str(seed) for seed in range(args.seeds)]
    todo = [
        (config, folder, seed, args.threads, device)
        for seed, folder in enumerate(folders)
        if not (folder / "resources.json").exists()
    ]
    with multiprocessing.pool.ThreadPool(args.processes) as pool:
        pool.starmap(train, todo)
    return folders


def train(config, folder, seed, threads, device):
    """A run as a user makes it, and what it took of the machine."""
    flags = ["--config", config, "--model", smollm2.FOLDER, "--seed", seed, "--output", folder, "--overwrite"]
    flags += ["--device", device, "--threads", threads, "--save_model", "false"]
    command = [sys.executable, "-m", "es_finetune", "train", *flags]
    process = subprocess.Popen(list(map(str, command)))
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the run with seed {seed} failed")
    resources = {"cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_memory_bytes": usage.ru_maxrss * 1024}
    (folder / "resources.json").write_text(json.dumps(resources))


def outcome(folder):
    """{seed, base, final, curve, seconds, live, cpu_seconds, peak_memory_bytes} of a run. A point of the curve is
    [seconds of generations until then, generation, exact, format], all on the held-out questions."""
    summary = json.loads((folder / "summary.json").read_text())
    until = [0.0, *itertools.accumulate(row["seconds"] for row in read_rows(folder / "metrics.jsonl"))]
    return {
        "seed": summary["seed"],
        "base": summary["base"],
        "final": summary["final"],
        "curve": [
            [until[row["generation"]], row["generation"], row["exact"], row["format"]]
            for row in read_rows(folder / "evals.jsonl")
        ],
        "seconds": summary["seconds_total"],
        "live": summary["live"],
        **json.loads((folder / "resources.json").read_text()),
    }
