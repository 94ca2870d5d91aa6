"""The kernels: how fast, how far from the limit, against what people use today.

    python -m bench.speed.kernels [--device cpu|cuda] [--out bench/results] [--seconds 3000]

Writes kernels-cpu.json or kernels-GPU.json after every row, so that what was measured stays when time runs out or a
group fails. `left_out` says what was not measured, and why: no time, or too little memory for what is counted before
(sizes times bytes a value). Three lists of rows:

calls    One flat tensor: every operation, dtype, rounding, backend and size. Beside the time: bytes, share of the
         bandwidth of a copy of the same tensor in the same rounds (the floor), normals made, and on a GPU the share of
         the instructions it can issue at the clock that was read.
tables   The true shapes of real models in one launch, against one flat tensor of their size.
rivals   What one member and one update of a generation cost, ours against the baselines (baselines.py), with peak extra
         memory.

Variants are interleaved; figures are medians of rounds with 20th and 80th percentile. On a GPU all that is timed is in
its queue before it begins (timing.py): calls and tables as captured graphs; baselines eagerly, and their rows give the
host's seconds beside the GPU's. A kernel whose bits are not the reference's gets no row.
"""

import argparse
import functools
import gc
import itertools
import json
import math
import os
import pathlib
import sys
import time
from typing import NamedTuple

# torch's OpenMP threads spin for a while after every parallel region, on the cores that the next variant needs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

import es_kernels
from bench import RESULTS
from bench.common import environment, shapes, timing
from bench.common.methods import HELD, SIGMA, YARDSTICK, coefficients, make_methods
from bench.common.operations import DTYPES, Operation, operations, right, right_at_size
from bench.common.timing import Variant, interleave
from es_finetune.runs.files import write_atomically
from es_kernels import ParamTable
from es_kernels.backends import cpu

# The first is that of a large weight: the size of the tables in docs/results
SIZES = [1 << 24, 1 << 16, 1 << 20, 1 << 27, 1 << 30]
MOST_NORMALS = {"cpu": 1 << 32, "cuda": 1 << 38}  # of one call: a second or two
# Model -> members of the update against baselines, 0 for none: on a CPU each takes minutes for the noise of 30.
MODELS = {
    "cpu": {"50M": 8, "Qwen2.5-0.5B": 0},
    "cuda": {"Qwen2.5-7B": 30, "Qwen2.5-0.5B": 30, "Qwen2.5-1.5B": 30, "Llama-3.1-8B": 0},
}
# Of what is free, at most: what is counted lacks only what the allocator rounds up. On a CPU pages that files hold may
# be had too, or not.
MEMORY_SHARE = {"cpu": 0.6, "cuda": 0.95}


class Place(NamedTuple):
    """What computes: a backend, on a CPU with an instruction set and a number of threads."""

    backend: str
    isa: str | None = None
    threads: int | None = None

    def enter(self):
        if self.isa:
            os.environ["ES_KERNELS_ISA"] = self.isa
            torch.set_num_threads(self.threads)


def places(device):
    """Groups of places that can be interleaved with each other. On a CPU each is alone, since threads and instruction
    set are the process's."""
    if device == "cuda":
        why = {name: es_kernels.backends.unavailable(name, torch.device(device)) for name in ("cuda", "triton")}
        for name, reason in why.items():
            if reason:
                print(f"{name}: not measured, {reason}", file=sys.stderr)
        return [[Place(name) for name, reason in why.items() if reason is None]]
    threads = sorted({1, len(os.sched_getaffinity(0))}, reverse=True)
    return [[Place("cpu", isa, n)] for isa in cpu.isas() for n in threads]


class Report:
    """The result file, and the time that is left."""

    def __init__(self, device, folder, seconds):
        self.device, self.end = device, time.monotonic() + seconds
        facts = environment.describe(device)
        self.path = folder / f"kernels-{environment.slug(facts)}.json"
        self.right = {}
        self.content = {"machine": facts, "complete": False, "left_out": [], "calls": [], "tables": [], "rivals": []}
        self.instructions = _instructions(facts.get("capability"))
        self.issue_a_mhz = facts["sms"] * 128 * 1e6 if "sms" in facts else None  # 4 warps of 32 lanes a cycle and SM

    def add(self, kind, row):
        self.content[kind].append(row)
        name = row.get("operation") or f"{row['who']}: {row['what']}"
        print(
            f"{kind:7} {row.get('backend', ''):8} {row.get('model', ''):14} {name:40} {row['seconds'] * 1e3:10.3f} ms  "
            f"{row.get('gb_per_s', 0):8.1f} GB/s",
            flush=True,
        )
        self.save()

    def leave_out(self, why, kind, **about):
        """about: `model`, and of baselines `who` and `what`, if it is of no others."""
        self.content["left_out"].append({"kind": kind, **about, "why": why})
        print(f"left out: {kind} {', '.join(map(str, about.values()))}: {why}", file=sys.stderr, flush=True)
        self.save()

    def fits(self, needed, kind, **about):
        """Whether so many bytes can be had. If not, that is noted."""
        usable = MEMORY_SHARE[self.device] * _free_bytes(self.device)
        if needed > usable:
            self.leave_out(f"needs {needed / 1e9:.1f} GB, {usable / 1e9:.1f} GB can be had", kind, **about)
        return needed <= usable

    def save(self):
        write_atomically(self.path, json.dumps(self.content, indent=1) + "\n")

    def passes(self, place, operation, out=None, base=None):
        """The gate; `out` and `base`: on these tensors too. What does not pass is told, and makes main() fail."""
        if (place, operation) not in self.right:
            self.right[place, operation] = right(operation, self.device, place.backend)
        if self.right[place, operation] and (
            out is None or right_at_size(operation, out, base, self.device, place.backend)
        ):
            return True
        what = " ".join(
            map(str, (*filter(None, place), operation.label, *([] if out is None else [f"{out.numel()} elements"])))
        )
        print(f"WRONG BITS, not measured: {what}", file=sys.stderr)
        self.content.setdefault("wrong", []).append(what)
        return False

    def out_of_time(self):
        return time.monotonic() > self.end


def _instructions(capability):
    """{kernel: instructions a value, of an update a normal} of this GPU, as counted."""
    rows = json.loads((RESULTS / "static_analysis.json").read_text())["rows"]
    return {row["kernel"]: row["instructions_per_value"] for row in rows if row["arch"] == capability}


def _free_bytes(device):
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# ---- calls ----


def measure_calls(report, group, dtype, elements, wanted):
    """One flat tensor, the operations wanted on it, beside a copy of it."""
    device, size = report.device, DTYPES[dtype].itemsize
    copies = timing.buffers(elements * size, device)  # in place nothing else is touched
    # The weights, their copy, the base; of torch's expression the noise and its product.
    temporaries = 2 * size * elements if elements == SIZES[0] else 0
    if not report.fits(copies * elements * (2 * size + 4) + temporaries, "calls", dtype=dtype, elements=elements):
        return
    outs = [torch.empty(elements, dtype=DTYPES[dtype], device=device).normal_(0, 0.02) for _ in range(copies)]
    bases = [torch.empty(elements, device=device).normal_(0, 0.02) for _ in range(copies)]
    others = [torch.empty_like(out) for out in outs]
    tables = [ParamTable({f"w{k}": out}) for k, out in enumerate(outs)]
    masters = [ParamTable({f"w{k}": base}) for k, base in enumerate(bases)]
    variants = {"copy": Variant(lambda k: others[k].copy_(outs[k]), copies)}
    if elements == SIZES[0]:
        variants["torch"] = Variant(
            lambda k: outs[k].add_(SIGMA * torch.randn_like(outs[k])), copies, capture=device == "cuda"
        )
    timed = {}
    for place in group:
        place.enter()
        for operation in wanted:
            if elements * operation.seeds > MOST_NORMALS[device]:
                continue
            if not report.passes(place, operation, outs[0], bases[0] if operation.base else None):
                continue
            with es_kernels.backend(place.backend):
                calls = [operation.on(table, master, device) for table, master in zip(tables, masters, strict=True)]
            name = f"{place.backend} {operation.label}"
            timed[name] = place, operation
            variants[name] = Variant(lambda k, calls=calls, backend=place.backend: _with(backend, calls[k]), copies)
    timings = interleave(variants, device, rounds=9 if elements <= SIZES[0] else 5)
    floor = 2 * size * elements / timings["copy"].median
    about = {"dtype": dtype, "elements": elements, "copies": copies, **group[0]._asdict()}
    for name in (n for n in _TORCH if n in timings):
        row = about | {"backend": "torch", "operation": _TORCH[name]}
        report.add(
            "calls", _call_row(report, row, timings[name], 2 * size * elements, elements * (name == "torch"), floor)
        )
    for name, (place, operation) in timed.items():
        row = about | {
            "backend": place.backend,
            "operation": operation.label,
            "kernel": operation.kernel,
            "seeds": operation.seeds,
        }
        normals = 0 if operation.what == "fingerprint" else elements * operation.seeds
        row = _call_row(report, row, timings[name], operation.bytes_per_value * elements, normals, floor)
        if "torch" in timings and normals:
            row["times_torch"] = timings["torch"].median / elements / (timings[name].median / normals)
        if device == "cuda" and elements == 1 << 27 and operation.seeds in (1, 30) and not operation.stochastic:
            row["joules"] = timing.joules(variants[name], device)
        report.add("calls", row)


_TORCH = {"copy": "copy (the floor)", "torch": "p.add_(s * torch.randn(p.shape))"}


def _with(backend, call):
    with es_kernels.backend(backend):
        call()


def _call_row(report, row, seconds, moved, normals, floor):
    row |= seconds.row() | {
        "bytes": moved,
        "gb_per_s": moved / seconds.median / 1e9,
        "share_of_copy": moved / seconds.median / floor,
    }
    if normals:
        row["normals_per_s"] = normals / seconds.median
    kernel = row.get("kernel", "")
    instructions = report.instructions.get("triton " * (row["backend"] == "triton") + kernel)
    if instructions and seconds.sm_mhz:
        counted = normals if kernel.startswith("update") else row["elements"]
        row["share_of_issue"] = counted * instructions / seconds.median / (report.issue_a_mhz * seconds.sm_mhz)
    return row


# ---- tables and baselines: the shapes of real models ----

# What measure_baselines calls of ours.
OURS = [
    Operation("perturb", "bf16", "f32"),
    Operation("perturb", "bf16", "bf16"),
    Operation("perturb", "bf16"),
    Operation("restore", "bf16", "f32", 0),
]
OURS += [Operation("update", "f32", None, 30), Operation("update", "bf16", None, 30, True)]


def _weights(model, device):
    return {
        name: torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
        for name, shape in shapes.parameter_shapes(model).items()
    }


def _sizes(model):
    return [math.prod(shape) for shape in shapes.parameter_shapes(model).values()]


def _table_and_flat(model, dtype, device):
    """The weights of a model as views of one memory, and as many values of it as one tensor: half the memory of two.
    Each tensor starts at a multiple of 512 bytes, as torch's allocator would have it."""
    aligned = 512 // dtype.itemsize
    *starts, total = itertools.accumulate((-(-n // aligned) * aligned for n in _sizes(model)), initial=0)
    memory = torch.empty(total, dtype=dtype, device=device).normal_(0, 0.02)
    table = {
        name: memory[at : at + math.prod(shape)].view(shape)
        for at, (name, shape) in zip(starts, shapes.parameter_shapes(model).items(), strict=True)
    }
    return table, {"whole": memory[: sum(_sizes(model))]}


def measure_table(report, group, model):
    """A whole model in one launch, and a flat tensor of its size."""
    device, values = report.device, sum(_sizes(model))
    if not report.fits((2 + 4) * values, "tables", model=model):
        return
    live, flat_live = _table_and_flat(model, torch.bfloat16, device)
    master, flat_master = _table_and_flat(model, torch.float32, device)
    flat = flat_live, flat_master
    wanted = [o for o in operations("bf16") if not o.stochastic and o.seeds <= 30 and o.what != "update"] + [
        o for o in operations("f32") if o.what == "update" and o.seeds == 30
    ]
    wanted = [o for o in wanted if values * o.seeds <= MOST_NORMALS[device]]
    variants, timed = {}, {}
    for place, (form, (outs, bases)) in itertools.product(group, {"table": (live, master), "flat": flat}.items()):
        place.enter()
        for operation in (o for o in wanted if report.passes(place, o)):
            out, base = ParamTable(outs if operation.out == "bf16" else bases), ParamTable(bases)
            with es_kernels.backend(place.backend):
                call = operation.on(out, base, device)
            timed[form, place, operation] = name = f"{form} {place.backend} {operation.label}"
            variants[name] = Variant(lambda k, call=call, backend=place.backend: _with(backend, call))
    timings = interleave(variants, device, rounds=5)
    for (form, place, operation), name in timed.items():
        if form == "table":
            row = {
                "model": model,
                "tensors": len(live),
                "elements": values,
                **place._asdict(),
                "operation": operation.label,
                **timings[name].row(),
            }
            moved = operation.bytes_per_value * values
            report.add(
                "tables",
                row
                | {
                    "bytes": moved,
                    "gb_per_s": moved / row["seconds"] / 1e9,
                    "times_flat": row["seconds"] / timings[f"flat {name[6:]}"].median,
                },
            )


def measure_baselines(report, group, model, seeds):
    """`member`: what one member's weights cost, until the next may begin (baselines perturb and restore). `update`: of
    `seeds` members, until live weights are ready. seeds = 0: no update."""
    device, place, sizes = report.device, group[0], _sizes(model)
    place.enter()
    if not report.fits(HELD(sizes), "rivals", model=model):
        return
    passing = [report.passes(place, operation) for operation in OURS]  # a list: each that is wrong is reported
    if not all(passing):
        return
    live = _weights(model, device)
    all_methods = make_methods(live)
    for what in ("member", "update") if seeds else ("member",):
        counted = {name: getattr(method, f"{what}_bytes")(sizes) for name, method in all_methods.items()}
        fitting = {
            name: all_methods[name]
            for name, needed in counted.items()
            if report.fits(needed, "rivals", model=model, who=name, what=what)
        }

        def work(n_seeds, fitting=fitting, what=what):
            return {
                name: method.member if what == "member" else functools.partial(method.update, *coefficients(n_seeds))
                for name, method in fitting.items()
            }

        # Eagerly, as baselines must: a generator's seed cannot be captured. Ours is one launch, or two.
        variants = {name: Variant(lambda k, run=run: run(), capture=False) for name, run in work(seeds).items()}
        timings, ratios = {}, {}
        for empties_cache in (False, True):
            together = {
                name: v
                for name, v in variants.items()
                if name == YARDSTICK or all_methods[name].empties_cache == empties_cache
            }
            measured = interleave(together, device, rounds=3)
            ratios = {name: measured[name].median / measured[YARDSTICK].median for name in measured} | ratios
            timings = measured | timings
        for name, run in work(2).items():  # nobody's memory depends on the number of seeds
            row = {
                "model": model,
                "tensors": len(live),
                "elements": sum(sizes),
                **place._asdict(),
                "who": name,
                "what": what,
                "seeds": seeds if what == "update" else 1,
            }
            row |= timings[name].row() | {"times_ours": ratios[name]}
            row["counted_extra_bytes"] = counted[name]
            report.add("rivals", row | {"peak_extra_bytes": timing.peak_extra_bytes(run, device)})
            if device == "cuda":
                torch.cuda.empty_cache()  # of temporaries that the next may not find room beside


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--seconds", type=float, default=3000, help="begin no further group after so long")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    groups = places(args.device)
    if not any(groups):
        raise SystemExit("no backend can be measured on this device: python -m es_kernels says why")
    report = Report(args.device, args.out, args.seconds)
    best = groups[0]
    every = {dtype: operations(dtype) for dtype in ("bf16", "f32", "f16")}
    main_ones = {
        dtype: [o for o in every[dtype] if o.seeds in (1, 30) and not o.stochastic] for dtype in ("bf16", "f32")
    }
    plan = [("calls", measure_calls, best, dtype, SIZES[0], wanted) for dtype, wanted in every.items()]
    plan += [
        ("calls", measure_calls, group, dtype, SIZES[0], wanted)
        for dtype, wanted in main_ones.items()
        for group in groups[1:]
    ]
    plan += [("rivals", measure_baselines, best, model, seeds) for model, seeds in MODELS[args.device].items()]
    plan += [("tables", measure_table, best, model) for model in MODELS[args.device]]
    plan += [("calls", measure_calls, best, dtype, n, wanted) for n in SIZES[1:] for dtype, wanted in every.items()]
    complete = True
    for kind, function, group, *arguments in plan:
        about = (
            dict(zip(("dtype", "elements"), arguments, strict=False)) if kind == "calls" else {"model": arguments[0]}
        )
        if group is not best:
            about["place"] = " ".join(map(str, group[0]))
        try:
            if report.out_of_time():
                raise RuntimeError("no time")
            function(report, group, *arguments)
        except RuntimeError as error:  # of a GPU: out of memory, a launch that failed. The others may still be measured
            complete = False
            report.leave_out((str(error).splitlines() or [type(error).__name__])[0], kind, **about)
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    report.content["complete"] = complete
    report.save()
    if report.content.get("wrong"):
        raise SystemExit("some kernels gave wrong bits: " + "; ".join(report.content["wrong"]))


if __name__ == "__main__":
    main()
