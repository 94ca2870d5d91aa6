"""What kernels of counted cost can reach on GPUs of published rates: a prediction, and beside it what was measured, if
anything was.

Each resource of a GPU needs some time for a value; the one that needs most binds. With perfect overlap, no tail of the
launch and the boost clock held nothing is faster than that, so every figure here is an upper bound:

    memory   bytes moved / (bandwidth * COPY_SHARE)
    issue    instructions / (SMs * 128 * clock)            4 warps of 32 lanes a cycle
    a pipe   its instructions / (SMs * rate of the pipe * clock)
    share of a copy = memory / the largest of these
"""

import json
import math
from typing import NamedTuple

from bench.common import shapes

COPY_SHARE = 0.9  # of the datasheet's bandwidth that a copy reaches: 4.3 of 4.8 TB/s on an H200


class GPU(NamedTuple):
    """Published figures, and results a cycle and SM by pipe."""

    arch: str
    sms: int
    ghz: float
    gb_per_s: float
    tflops: float  # of dense bf16 products
    rates: dict
    assumed: tuple = ()  # what is not published


# CUDA C++ Programming Guide, table "Throughput of Native Arithmetic Instructions": 32-bit floating-point multiply-add;
# integer add, compare, logic and shift (ALU); integer multiply-add (IMAD.WIDE); type conversions (16 on cc 8.0, where
# I2F runs; from 9.0 on it is I2FP of the ALU). FMA is shared: integer multiply-adds run there too. LSU: 32 load / store
# units an SM (the architectures' white papers).
_CC_80 = {"FMA": 64, "ALU": 64, "IMAD.WIDE": 64, "MUFU": 16, "LSU": 32}
_CC_90 = {"FMA": 128, "ALU": 64, "IMAD.WIDE": 64, "MUFU": 16, "LSU": 32}

# SMs, boost clock and bandwidth by the datasheets; Hopper's clock is that of its 67 TFLOP/s.
GPUS = {
    "A100 80GB SXM": GPU("sm_80", 108, 1.41, 2039, 312, _CC_80),
    "H100 SXM": GPU("sm_90", 132, 1.98, 3350, 989, _CC_90),
    "H200 SXM": GPU("sm_90", 132, 1.98, 4800, 989, _CC_90),
    # Of the B200 NVIDIA publishes bandwidth and dense products; the rest is as others read it off the device, the
    # integer rates are those of cc 9.0.
    "B200": GPU("sm_100", 148, 1.965, 8000, 2250, _CC_90, ("SMs", "clock", "rates of ALU, IMAD.WIDE, MUFU and LSU")),
}
_BYTES = {"f32": 4, "bf16": 2, "f16": 2}


def predict(row, gpu):
    """What binds a row of static_analysis.py on a GPU: {share_of_copy, binds, busy: share of its time that each
    resource works}. An update with many seeds moves next to nothing: its figure is normals_per_s."""
    g = GPUS[gpu]
    cycles = {"issue": row["instructions_per_value"] / 128}
    pipes = row["per_value"]
    for pipe, rate in g.rates.items():
        cycles[pipe] = (pipes.get(pipe, 0) + (pipes.get("IMAD.WIDE", 0) if pipe == "FMA" else 0)) / rate
    seconds = {name: n / (g.sms * g.ghz * 1e9) for name, n in cycles.items()}
    moved = bytes_per_value(row["kernel"])
    if moved:
        seconds["memory"] = moved / (g.gb_per_s * 1e9 * COPY_SHARE)
    binds = max(seconds, key=seconds.get)
    prediction = {
        "binds": binds,
        "busy": {name: round(s / seconds[binds], 3) for name, s in seconds.items()},
        "assumed": list(g.assumed),
    }
    return prediction | (
        {"share_of_copy": round(seconds["memory"] / seconds[binds], 3)}
        if moved
        else {"normals_per_s": float(f"{1 / seconds[binds]:.3g}")}
    )


def bytes_per_value(kernel):
    """Read and written, 0 for the loop over seeds of an update."""
    return 0 if "update" in kernel else sum(_BYTES.get(word, 0) for word in kernel.split())


def measured(folder):
    """{(GPU's name, kernel): row of kernels.py at its largest size}, of every GPU result in a folder."""
    largest = {}
    for path in sorted(folder.glob("kernels-*.json")):
        report = json.loads(path.read_text())
        for row in report["calls"] if "gpu" in report["machine"] else ():
            kernel = "triton " * (row["backend"] == "triton") + row.get("kernel", "")
            best = largest.get((report["machine"]["gpu"], kernel))
            if best is None or (row["elements"], row.get("seeds", 0)) > (best["elements"], best.get("seeds", 0)):
                largest[report["machine"]["gpu"], kernel] = row
    return largest


def predictions(rows, folder):
    """One row for every kernel of `rows` and GPU of its architecture, with `measured` beside it where there is one."""
    known = measured(folder)
    predicted = []
    for row in rows:
        for gpu, g in GPUS.items():
            if g.arch != row["arch"]:
                continue
            prediction = {"gpu": gpu, "kernel": row["kernel"], "predicted": predict(row, gpu)}
            beside = next(
                (r for (name, kernel), r in known.items() if kernel == row["kernel"] and gpu.split()[0] in name), None
            )
            if beside:
                key = "share_of_copy" if bytes_per_value(row["kernel"]) else "normals_per_s"
                prediction["measured"] = {key: beside[key], "elements": beside["elements"]}
            predicted.append(prediction)
    return predicted


def decoding_step(model, gpu, members, prompts, position):
    """Seconds that one token of every row takes at least, in bf16 with noise of rank 1: {"plain", "one batch", "one by
    one"}. What is launched in between, softmax and norms are left out, so an engine without CUDA graphs is slower in
    all three.

        plain       the larger of: bytes of weights and KV cache; 2 operations a weight and row
        one batch   and the members' terms, by two more products a matrix [m, n]: its factors read, m + n a member;
                    x read, y read and written, n + 2 m a row
        one by one  plain for the prompts of one member, as often as there are members

    model: of shapes.MODELS. position: tokens that a row has in its cache.
    """
    g, m = GPUS[gpu], shapes.MODELS[model]
    bandwidth = g.gb_per_s * 1e9 * COPY_SHARE
    # Of an embedding that is not the head too only rows are read
    of_products = [name for name in shapes.parameter_shapes(model) if m.tied or "embed" not in name]
    matrices = [s for name in of_products if len(s := shapes.parameter_shapes(model)[name]) == 2]
    weights = sum(map(math.prod, matrices))
    a_token = 2 * m.layers * m.kv_heads * (m.hidden // m.heads) * 2

    def plain(rows):
        return max((2 * weights + rows * position * a_token) / bandwidth, 2 * weights * rows / (g.tflops * 1e12))

    rows = members * prompts
    terms = 2 * sum(members * (a + b) + rows * (b + 2 * a) for a, b in matrices)
    return {
        "plain": plain(rows),
        "one batch": plain(rows) + terms / bandwidth,
        "one by one": members * plain(prompts),
    }
