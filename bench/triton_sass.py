"""The SASS that a value costs in the Triton kernels, in the terms of static_analysis.py. No GPU needed."""

import pathlib
import re
import subprocess
import tempfile

import sass

from es_kernels.backends import triton as backend

_WHAT = ("one seed", {"n_seeds": 1}), ("any number of seeds", {"n_seeds": None}), ("stochastic", {"n_seeds": 1, "stochastic": True})


def rows(arch):
    """One row per combination of storage formats on the 128-bit path of a contiguous tensor, and for the loop over seeds."""
    found = []
    for what, options in _WHAT:
        with tempfile.TemporaryDirectory() as folder:
            cubin = pathlib.Path(folder) / "kernel.cubin"
            cubin.write_bytes(backend.compile_for(int(arch.removeprefix("sm_")), **options).asm["cubin"])
            ((_, code),) = sass.functions(cubin, arch).items()
            usage = subprocess.run([sass.tool("cuobjdump"), "-res-usage", str(cubin)], capture_output=True, text=True, check=True).stdout
        numbers = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        resources = {"registers": numbers["REG"], "spill_bytes": numbers["STACK"] + numbers["LOCAL"]}
        for label, cost in _loops(code, what):
            found.append({"arch": arch, "kernel": label, **cost, **resources})
    return found


def _loops(code, what):
    """(label, cost) of the cheapest trip through each way of the vector loops."""
    best = {}
    for start, end in _innermost(code):
        for trip in _trips(code, start, end):
            if sass.values(trip) == 0:
                continue
            accesses = sass.cost(trip)["accesses"]
            if what == "any number of seeds":
                label = "triton update, a seed" if not accesses.keys() - {"LDG.E.64", "LDG.E"} and sass.values(trip) >= 8 else None
            else:
                label = _label(trip, what == "stochastic")
            if label and (label not in best or len(trip) < best[label]["instructions_per_value"] * best[label]["values"]):
                best[label] = sass.cost(trip)
    return sorted(best.items())


def _label(trip, stochastic):
    text = [i.text for i in trip]
    stores = [t for t in text if t.startswith("STG")]
    if not stores or any(".128" not in t for t in stores):
        return None
    halves = sum(t.startswith("HADD2.F32") for t in text)
    units = sass.values(trip) // (16 if stochastic and False else 8)
    unpacked = sum(bool(re.match(r"(IMAD\.U32|SHF\.L\.U32|IMAD\.SHL|PRMT).*(0x10000|0x10,|0x1040|0x5410)", t)) for t in text)
    base = "f16" if halves >= 8 * units else "bf16" if unpacked >= 4 * units else "f32"
    out = "f32" if len(stores) == 2 * units else "f16" if any("F2FP.F16" in t or "0x38800000" in t for t in text) else "bf16"
    return f"triton perturb{' stochastic' if stochastic else ''} {out} <- {base}"
