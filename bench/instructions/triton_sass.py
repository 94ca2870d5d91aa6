"""The SASS that a value costs in the Triton kernels: rows for static_analysis.py. No GPU needed."""

import collections
import pathlib
import re
import tempfile

from bench.instructions import sass
from es_kernels.backends import triton as backend

_VARIANTS = {"": {}, " stochastic": {"stochastic": True}, "update": {"n_seeds": None}}
_VARIANTS |= {" rank 1": {"noise_rank": 1}, "update rank 1": {"noise_rank": 1, "n_seeds": None}}
_TILE_VALUES = 64  # of a thread, in a tile of a matrix; an update draws for eight seeds at a time


def rows(arch):
    """Of the 128-bit path over contiguous tensors: one row per storage format of out and base, and one for the loop
    over seeds."""
    by_label = {}
    for variant, options in _VARIANTS.items():
        with tempfile.TemporaryDirectory() as folder:
            cubin = pathlib.Path(folder) / "kernel.cubin"
            cubin.write_bytes(backend.compile_for(int(arch.removeprefix("sm_")), **options).asm["cubin"])
            (code,) = sass.functions(cubin, arch).values()
            (resources,) = sass.resources(cubin).values()
        for trip in _trips(code):
            label, values = _label(trip, variant)
            if label:
                row = {"arch": arch, "kernel": f"triton {label}", **sass.cost(trip, values), **resources}
                # The loop over several rows, which divides, has the same formats: the cheaper one is that of a
                # contiguous tensor.
                if label not in by_label or row["instructions_per_value"] < by_label[label]["instructions_per_value"]:
                    by_label[label] = row
    return list(by_label.values())


def _trips(code):
    """Every path through every innermost loop that makes normals, as lists of instructions."""
    index = {i.address: k for k, i in enumerate(code)}
    loops = collections.defaultdict(int)
    for k, i in enumerate(code):
        start = index.get(sass.branch_target(i), k)
        if start < k:
            loops[start] = max(loops[start], k)
    for start, end in loops.items():
        if any(s != start and start <= s and e <= end for s, e in loops.items()):
            continue
        unfinished = [(start, [])]
        while unfinished:
            k, path = unfinished.pop()
            while start <= k <= end:
                i = code[k]
                path = [*path, i]
                target = index.get(sass.branch_target(i))
                if target == start and sass.normals(path):
                    yield path
                elif target is not None and target > k:
                    unfinished.append((target, path))
                if target is not None and not i.predicate and not re.search(r"BRA.*\bU?P\d", i.text):
                    break
                k += 1


def _label(trip, variant):
    """What the loop does, and for how many values (of an update: for how many seeds, too); None, 0 for others."""
    text = [i.text for i in trip]
    values, of_rank = sass.normals(trip), "rank" in variant
    stores = [t for t in text if t.startswith("STG")]
    if of_rank:
        products = sum(1 + t.startswith("FFMA2") for t in text if t.startswith("FFMA"))
        values = _TILE_VALUES * (8 if variant.startswith("update") else 1)
        if not values <= products < 2 * values or sass.normals(trip) >= 16:
            return None, 0  # one seed at a time, or full noise
    if variant.startswith("update"):
        loop = not stores and values >= 16 and not any(".128" in t and t.startswith("LDG") for t in text)
        return (variant, values) if loop else (None, 0)
    if values < 16 or len(stores) not in (values // 8, values // 4) or not all(".128" in t for t in stores):
        return None, 0  # not vectors, or the way around the last stores
    unpacked = sum("0xffff0000" in t and t.startswith("LOP3") for t in text)
    base = (
        "f16"
        if sum(t.startswith("HADD2.F32") for t in text) >= values
        else "bf16"
        if unpacked >= values // 2
        else "f32"
    )
    f16 = any(t.startswith("F2FP") and "BF16" not in t for t in text) or any("0x38800000" in t for t in text)
    out = "f32" if len(stores) == values // 4 else "f16" if f16 else "bf16"
    return f"perturb{variant} {out} <- {base}", values
