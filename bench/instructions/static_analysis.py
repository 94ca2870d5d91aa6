"""Counts the SASS instructions that a value costs in the steady state of every kernel, from the built objects; no GPU
needed.

    python -m bench.instructions.static_analysis [--json bench/results/static_analysis.json] [--archs 90]

Then gpus.py predicts from these counts and published rates what share of a copy's bandwidth each kernel can reach on an
A100, H100, H200 and B200.

Steady state: one trip through the innermost loop, over the values that it does (of an update: the normals that it
makes). Where the code branches (a NaN was seen) the shortest path is the one that data takes. Counted, not measured:
how fast a kernel runs is kernels.py's question.
"""

import argparse
import json
import pathlib
import re

from bench import RESULTS
from bench.common import gpus
from bench.instructions import low_rank_sass, sass
from es_finetune.runs.files import write_atomically
from es_kernels import native

# What the design asks of sm_90: instructions a value, of an update a normal. Of a swap: what 70% of a copy leaves room
# for (44), and a little less.
BUDGET = {
    "swap bf16 <- bf16": 42,
    "fingerprint bf16": 10,
    "perturb bf16 <- bf16": 23,
    "perturb bf16 <- f32": 22,
    "update": 21.5,
    "update stochastic": 21.5,
}
# Over the rows of a shard: four more.
BUDGET |= {"perturb rows bf16 <- bf16": 27, "perturb rows bf16 <- f32": 26}
# Noise of low rank; an update for each value and seed
BUDGET |= {"perturb rank 1 bf16 <- bf16": 7, "update rank 1": 1.5, "update stochastic rank 1": 1.5}
BUDGET |= {"triton perturb bf16 <- bf16": 25, "triton perturb bf16 <- f32": 23.5, "triton update": 22}
BUDGET |= {"triton perturb rank 1 bf16 <- bf16": 9, "triton perturb rank 1 bf16 <- f32": 7.5}
BUDGET |= {"triton perturb rank 1 f32 <- f32": 7.5, "triton update rank 1": 1.6}


def cuda_kernels(arch, library=None):
    """One row per kernel and pair of formats of libes_cuda.so (or another build of it): instructions a value, pipes,
    128-bit accesses, registers, spills."""
    library = library or native.path("cuda")
    resources = sass.resources(library, arch)
    rows = {}
    for name, code in sass.functions(library, arch).items():
        kernel, stochastic, variant = re.search(
            r"(perturb|update|fingerprint|low_rank|write_factors)(?:<(true|false)(?:, (?:\(int\))?(\w+))?>)?", name
        ).groups()
        if kernel == "write_factors":  # 5 MB for a member of a 7B model
            continue
        if kernel == "low_rank":
            counted = low_rank_sass.rows(code, " stochastic" * (stochastic == "true"), variant == "true")
            for label, (trip, values) in counted.items():
                rows[label] = {"arch": arch, "kernel": label, **sass.cost(trip, values), **resources[name]}
            continue
        kernel = {"0": "restore", "2": "swap"}.get(variant, kernel) + " stochastic" * (stochastic == "true")
        for trip in sass.loops(code):
            label, values = _label(kernel, trip)
            # The loop that does what the unrolled one leaves has the same label, and fewer values.
            if label and (label not in rows or rows[label]["values"] < values):
                rows[label] = {"arch": arch, "kernel": label, **sass.cost(trip, values), **resources[name]}
    return list(rows.values())


def _label(kernel, trip):
    """What the loop does, from its instructions, and for how many values; None, 0 for loops of the general path
    (masked, or strided) and small ones."""
    text = [i.text for i in trip]
    # Is the unit past its row's last?
    kernel += " rows" * any(re.match(r"ISETP\.GE\.U32\.AND P\d, PT, R\d+\S*, U?R\d", t) for t in text)
    loads = sum("LDG" in t and ".128" in t for t in text)
    stores = sum("STG" in t and ".128" in t for t in text)
    if kernel.startswith("update"):
        return (kernel, sass.normals(trip)) if sass.normals(trip) >= 8 and not loads else (None, 0)
    if kernel.startswith("fingerprint"):
        # One an element, 12 to 14 a block: a load is 8 bf16 or 4 f32
        products = sum(t.startswith("IMAD.WIDE") for t in text)
        return (
            (f"{kernel} {'bf16' if products > 14 * loads else 'f32'}", loads * (8 if products > 14 * loads else 4))
            if loads
            else (None, 0)
        )
    if not loads or any(t.startswith("LDG.E.64") for t in text):  # the general path reads the segment in the loop
        return None, 0
    if "stochastic" in kernel:  # rounded by integers: f16 has a case for its subnormals
        out = "f16" if any(t.startswith("F2I") for t in text) else "bf16"
        out = out if stores == sass.normals(trip) // 8 else "f32"
    else:
        out = "bf16" if any("BF16" in t for t in text) else "f16" if any(t.startswith("F2FP") for t in text) else "f32"
    blocks = stores // (2 if out == "f32" else 1)
    base = "f32" if loads == 2 * blocks else "f16" if any(t.startswith("HADD2.F32") for t in text) else "bf16"
    return f"{kernel} {out} <- {base}", 8 * blocks


def triton_kernels(arch):
    """The same for the Triton kernels, if triton is installed."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return []
    from bench.instructions import triton_sass

    return triton_sass.rows(arch)


def over_budget(rows):
    """Rows of sm_90 that cost more than the design allows, and any that spill."""
    return [
        r
        for r in rows
        if r["spill_bytes"] or (r["arch"] == "sm_90" and r["instructions_per_value"] > BUDGET.get(r["kernel"], 1e9))
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=pathlib.Path, default=RESULTS / "static_analysis.json")
    parser.add_argument("--archs", nargs="+", type=int, default=[80, 90, 100, 120])
    args = parser.parse_args()
    if missing := native.why_not("cuda"):
        parser.error(missing)
    rows = [row for a in args.archs for row in cuda_kernels(f"sm_{a}") + triton_kernels(f"sm_{a}")]
    for r in rows:
        pipes = ", ".join(f"{pipe} {n:.2f}" for pipe, n in r["per_value"].items())
        print(
            f"{r['arch']:7} {r['kernel']:32} {r['instructions_per_value']:6.2f} a value  {r['registers']:3} registers  "
            f"{r['spill_bytes']} B spilled  ({pipes})"
        )
    predictions = gpus.predictions(rows, args.json.parent)
    for p in predictions:
        print(
            f"{p['gpu']:14} {p['kernel']:32} predicted {_reach(p['predicted'])}, {p['predicted']['binds']} binds"
            + (f"; measured {_reach(p['measured'])}" if "measured" in p else "")
        )
    args.json.parent.mkdir(parents=True, exist_ok=True)
    report = {"what": __doc__.split("\n")[0], "rows": rows, "predictions": predictions}
    write_atomically(args.json, json.dumps(report, indent=1) + "\n")


def _reach(figures):
    return (
        f"{figures['share_of_copy']:.0%} of a copy"
        if "share_of_copy" in figures
        else f"{figures['normals_per_s']:.3g} normals/s"
    )


if __name__ == "__main__":
    main()
