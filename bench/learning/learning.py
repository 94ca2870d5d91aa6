"""What the options do for learning: ES on the embedded model, the demo's settings, several seeds each.

    python -m bench.learning.learning [--seeds 6] [--processes 2] [--options NAME ...] [--json learning.json]

All runs cost the same number of evaluations: population 30, 30 generations, 128 prompts for each member. Held-out exact
answers after the last update, over 269 questions, have a standard error of 0.02 of their own; the error bars given are
over seeds, of the difference paired by seed, since a seed decides noise and prompts alike for all options. So small
differences stay unknown. The masters "fp32" and "host" give the same bits, so that their rows are one measurement.
With --options only these are run again; the runs of the others are those in the file.
"""

import argparse
import concurrent.futures
import contextlib
import io
import json
import math
import multiprocessing
import pathlib
import statistics
import tempfile

from bench import RESULTS

OPTIONS = {
    "z-scores": {},
    "antithetic pairs": {"antithetic": True},
    "centred ranks": {"shaping": "ranks"},
    "per-prompt normalisation": {"shaping": "per_prompt"},
    "momentum 0.5, lr halved": {"momentum": 0.5, "lr": 0.005},
    "noise of rank 1": {"noise_rank": 1, "members_at_once": 1},
    "noise of rank 4": {"noise_rank": 4, "members_at_once": 1},
    "rank 1, members in one batch": {"noise_rank": 1, "members_at_once": 30},
    "bf16, master fp32": {"dtype": "bfloat16", "master": "fp32"},
    "bf16, master host": {"dtype": "bfloat16", "master": "host"},
    "bf16, master copy": {"dtype": "bfloat16", "master": "copy"},
    "bf16, master none": {"dtype": "bfloat16", "master": "none"},
}

# What each is compared with
REFERENCE = {name: "bf16, master fp32" if "bf16" in name else "z-scores" for name in OPTIONS}
REFERENCE["rank 1, members in one batch"] = "noise of rank 1"


def run(name, seed):
    """One run: the held-out curve, and the fingerprint of the weights that it ended with."""
    from es_finetune import TrainConfig, Trainer

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config = TrainConfig(
            output=f"{folder}/run", seed=seed, report_to=["none"], save_model=False, health_every=0, **OPTIONS[name]
        )
        summary = Trainer(config).train()
    return {
        "option": name,
        "seed": seed,
        "base": summary["base"],
        "final": summary["final"],
        "curve": summary["held_out_curve"],
        "live": summary["live"],
    }


def table(runs):
    """One row for each option: mean and standard error over seeds, and of the difference to its reference."""
    final = {(r["option"], r["seed"]): r["final"] for r in runs}
    seeds = sorted({seed for _, seed in final})
    rows = []
    for name in OPTIONS:
        values = [final[name, seed] for seed in seeds]
        differences = [final[name, seed] - final[REFERENCE[name], seed] for seed in seeds]
        error, paired = (statistics.stdev(v) / math.sqrt(len(v)) for v in (values, differences))
        rows.append(
            {
                "option": name,
                "reference": REFERENCE[name],
                "final": statistics.mean(values),
                "error": error,
                "difference": statistics.mean(differences),
                "difference_error": paired,
            }
        )
    return rows


def kept(path, options, seeds):
    """The runs of these options that the file has, with the first `seeds` seeds. SystemExit if one is missing."""
    if not options:
        return []
    runs = {(r["option"], r["seed"]): r for r in json.loads(path.read_text())["runs"]}
    wanted = [(name, seed) for name in options for seed in range(seeds)]
    missing = [place for place in wanted if place not in runs]
    if missing:
        raise SystemExit(f"{path} has no run of {missing[0][0]}, seed {missing[0][1]}: run it too")
    return [runs[place] for place in wanted]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--options", nargs="+", choices=OPTIONS, default=list(OPTIONS), metavar="NAME")
    parser.add_argument("--json", type=pathlib.Path, default=RESULTS / "learning.json")
    args = parser.parse_args()
    runs, others = [], kept(args.json, [name for name in OPTIONS if name not in args.options], args.seeds)
    with concurrent.futures.ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(run, name, seed) for seed in range(args.seeds) for name in args.options]
        for job in concurrent.futures.as_completed(jobs):
            runs.append(job.result())
            print(
                f"{len(runs)}/{len(jobs)}  {runs[-1]['option']}, seed {runs[-1]['seed']}: {runs[-1]['final']:.3f}",
                flush=True,
            )
    runs = sorted(runs + others, key=lambda r: (list(OPTIONS).index(r["option"]), r["seed"]))
    rows = table(runs)
    for row in rows:
        print(
            f"{row['option']:28s} {row['final']:.3f} +- {row['error']:.3f}   difference {row['difference']:+.3f} +- "
            f"{row['difference_error']:.3f}"
        )
    args.json.write_text(json.dumps({"seeds": args.seeds, "rows": rows, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
