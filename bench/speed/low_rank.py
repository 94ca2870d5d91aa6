"""Noise of low rank: what it costs beside a copy of the weights, and beside full noise.

    python -m bench.speed.low_rank [--device cpu|cuda] [--out bench/results]

Writes low_rank-cpu.json or low_rank-GPU.json, in two minutes. One square matrix, and all parameters of a small model;
on a CPU with one thread and with all, rank 1 also by every other instruction set. Perturbing is compared with restoring
from the same base, which moves as many bytes and makes no noise; an update with that of full noise; all threads with
one. What is compared is interleaved, figures are medians of rounds with 20th and 80th percentile. A kernel whose bits
are not the reference's gets no row.
"""

import argparse
import json
import os
import pathlib

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in kernels.py

import torch

import es_kernels
from bench import RESULTS
from bench.common import environment, shapes
from bench.common.operations import DTYPES, Operation, right, right_at_size
from bench.common.timing import Variant, interleave
from bench.speed.kernels import places
from es_finetune.runs.files import write_atomically
from es_kernels import ParamTable

RANKS = (0, 1, 4, 8)
# Rows and columns of the square matrix, by the number of seeds
SQUARES = {"cpu": {1: 4096, 30: 4096, 1024: 1024}, "cuda": {1: 16384, 30: 16384, 1024: 16384}}
MODEL = {"cpu": "SmolLM2-135M", "cuda": "Qwen2.5-1.5B"}


def groups(device, best):
    """(name of what is written, its shapes, operations that are compared with each other); `best`: for the place that
    serves by default."""
    for name, size in (("square", SQUARES[device]), (MODEL[device], None)) if best else (("square", SQUARES[device]),):
        for out, seeds in (("bf16", 1), *(("f32", seeds) for seeds in SQUARES[device])):
            many = seeds == max(SQUARES[device])
            ranks = RANKS if size and best and not many else RANKS[:2]
            if many and not (size and best):
                continue  # full noise would take minutes
            if seeds == 1:
                operations = [Operation("perturb", out, "f32", 1, noise_rank=rank) for rank in ranks]
                operations = [Operation("restore", out, "f32", 0), *operations]
            else:
                operations = [Operation("update", out, None, seeds, noise_rank=rank) for rank in ranks]
            yield name, {"w": (size[seeds],) * 2} if size else shapes.parameter_shapes(name), operations


def measure(where, name, tensors, operations, device):
    """(rows, what is wrong) of operations on tensors of these shapes, {name: shape}, at every place of `where`."""
    dtype = DTYPES[operations[0].out]
    out, base = (
        {name: torch.empty(shape, dtype=t, device=device).normal_(0, 0.02) for name, shape in tensors.items()}
        for t in (dtype, torch.float32)
    )
    table, master = ParamTable(out), ParamTable(base)
    variants, wrong = {}, []
    for place in where:
        place.enter()
        for operation in operations:
            with es_kernels.backend(place.backend):
                call = operation.on(table, master, device)
            whole = (out["w"], base["w"] if operation.base else None) if "w" in out else None
            if right(operation, device, place.backend) and (
                whole is None or right_at_size(operation, *whole, device, place.backend)
            ):
                variants[place, operation] = Variant(lambda k, place=place, call=call: _at(place, call))
            else:
                wrong.append(f"{' '.join(map(str, place))} {operation.label}")
    timings = interleave(variants, device, rounds=5)
    elements = sum(t.numel() for t in out.values())
    return [_row(place, operation, name, elements, timings) for place, operation in timings], wrong


def _at(place, call):
    place.enter()
    with es_kernels.backend(place.backend):
        call()


def _row(place, operation, name, elements, timings):
    seconds = timings[place, operation]
    row = {**place._asdict(), "on": name, "operation": operation.label, **operation._asdict(), "elements": elements}
    row |= seconds.row()
    beside = {
        "times_restore": (place, Operation("restore", operation.out, operation.base, 0)),
        "full_noise_takes": (place, operation._replace(noise_rank=0)) if operation.noise_rank else None,
        "one_thread_takes": (place._replace(threads=1), operation) if (place.threads or 1) > 1 else None,
    }
    for what, other in beside.items():
        if other in timings:
            ratio = seconds.median / timings[other].median
            row[what] = ratio if what == "times_restore" else 1 / ratio
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    facts = environment.describe(args.device)
    every = [place for group in places(args.device) for place in group]
    best = [place for place in every if place.isa == every[0].isa]
    others = [place for place in every if place.isa != every[0].isa]
    content = {"machine": facts, "rows": [], "wrong": []}
    plan = [(best, *group) for group in groups(args.device, True)]
    plan += [(others, *group) for group in groups(args.device, False)] if others else []
    for where, name, tensors, operations in plan:
        rows, wrong = measure(where, name, tensors, operations, args.device)
        content["rows"] += rows
        content["wrong"] += wrong
        for row in rows:
            print(
                f"{row['backend']} {row['isa']} {row['threads']} {name:14} {row['operation']:36} "
                f"{row['seconds'] * 1e3:10.3f} ms",
                flush=True,
            )
        write_atomically(args.out / f"low_rank-{environment.slug(facts)}.json", json.dumps(content, indent=1) + "\n")
    if content["wrong"]:
        raise SystemExit("some kernels gave wrong bits: " + "; ".join(content["wrong"]))


if __name__ == "__main__":
    main()
