"""Noise of low rank: what it costs beside a copy of the weights, and beside full noise.

    python -m bench.speed.low_rank [--device cpu|cuda] [--out bench/results]

Writes low_rank-cpu.json or low_rank-GPU.json, in a few minutes. One square matrix; on a CPU every instruction set with
one thread and with all. Perturbing is compared with restoring from the same base, which reads and writes as much and
makes no noise; an update with that of full noise; all threads with one. What is compared is interleaved, figures are
medians of rounds with 20th and 80th percentile. A kernel whose bits are not the reference's gets no row.
"""

import argparse
import json
import pathlib

import torch

import es_kernels
from bench import RESULTS
from bench.common import environment
from bench.common.operations import DTYPES, Operation, right, right_at_size
from bench.common.timing import Variant, interleave
from bench.speed.kernels import places
from es_finetune.runs.files import write_atomically
from es_kernels import ParamTable

RANKS = (0, 1, 4, 8)
# Rows and columns of the matrix, by the number of seeds of the operations on it
SIZES = {"cpu": {1: 4096, 30: 4096, 1024: 1024}, "cuda": {1: 16384, 30: 16384, 1024: 16384}}


def groups(sizes):
    """(rows and columns, operations that are compared with each other)."""
    for out, base in (("f32", "f32"), ("bf16", "f32")):
        perturb = [Operation("perturb", out, base, 1, noise_rank=rank) for rank in RANKS]
        yield sizes[1], [Operation("restore", out, base, 0), *perturb]
    for seeds in (30, 1024):
        yield sizes[seeds], [Operation("update", "f32", None, seeds, noise_rank=rank) for rank in RANKS]


def measure(places, operations, n, device):
    """Rows of one group of operations on an n x n matrix, at every place."""
    out = torch.empty(n, n, dtype=DTYPES[operations[0].out], device=device).normal_(0, 0.02)
    base = torch.empty(n, n, device=device).normal_(0, 0.02)
    table, master = ParamTable({"w": out}), ParamTable({"w": base})
    variants, wrong = {}, []
    for place in places:
        place.enter()
        for operation in operations:
            with es_kernels.backend(place.backend):
                call = operation.on(table, master, device)
            if right(operation, device, place.backend) and right_at_size(
                operation, out, base if operation.base else None, device, place.backend
            ):
                variants[place, operation] = Variant(lambda k, place=place, call=call: _at(place, call))
            else:
                wrong.append(f"{' '.join(map(str, place))} {operation.label}")
    timings = interleave(variants, device, rounds=7)
    return [_row(place, operation, n, timings) for place, operation in timings], wrong


def _at(place, call):
    place.enter()
    with es_kernels.backend(place.backend):
        call()


def _row(place, operation, n, timings):
    seconds = timings[place, operation]
    row = {**place._asdict(), "operation": operation.label, **operation._asdict(), "elements": n * n}
    row |= {"seconds": seconds.median, "p20": seconds.p20, "p80": seconds.p80}
    beside = {
        "times_restore": (place, Operation("restore", operation.out, operation.base, 0)),
        "full_noise_takes": (place, operation._replace(noise_rank=0)) if operation.noise_rank else None,
        "one_thread_takes": (place._replace(threads=1), operation) if (place.threads or 1) > 1 else None,
    }
    for name, other in beside.items():
        if other in timings:
            ratio = seconds.median / timings[other].median
            row[name] = ratio if name == "times_restore" else 1 / ratio
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    facts = environment.describe(args.device)
    every = [place for group in places(args.device) for place in group]
    content = {"machine": facts, "rows": [], "wrong": []}
    for n, operations in groups(SIZES[args.device]):
        rows, wrong = measure(every, operations, n, args.device)
        content["rows"] += rows
        content["wrong"] += wrong
        for row in rows:
            print(
                f"{row['backend']} {row['isa']} {row['threads']} {row['operation']:40} {row['seconds'] * 1e3:10.3f} ms"
            )
        write_atomically(args.out / f"low_rank-{environment.slug(facts)}.json", json.dumps(content, indent=1) + "\n")
    if content["wrong"]:
        raise SystemExit("some kernels gave wrong bits: " + "; ".join(content["wrong"]))


if __name__ == "__main__":
    main()
