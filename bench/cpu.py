"""CPU microbenchmark: the fused operation against `p.add_(s * torch.randn(p.shape))`, in one process, interleaved.

    python bench/cpu.py [--json bench/results/cpu.json] [--elements 16777216]

The floor is a copy of the same tensor in the same run. Medians of interleaved rounds; a backend whose bits differ from the reference
gets no row. The default size is that of a large weight, whose temporary malloc maps and unmaps at every call; torch is faster (4.3
instead of 7.7 ns a value here) where the temporary is under 32 MiB and malloc happens to keep it.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import time

# torch's OpenMP threads spin for a while after every parallel region, on the cores that the next variant needs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

import es_kernels
from es_kernels.backends import cpu

ROUNDS = 9


def correct(isa):
    """The gate: this instruction set gives the reference's bits."""
    ours, reference = torch.ones(10_007), torch.ones(10_007)
    es_kernels.add_noise_(ours, [1, 2], [0.5, -0.25], name="gate")
    with es_kernels.backend("reference"):
        es_kernels.add_noise_(reference, [1, 2], [0.5, -0.25], name="gate")
    return torch.equal(ours.view(torch.int32), reference.view(torch.int32))


def variants(n):
    """name -> (function, normals made by one call)."""
    f32, bf16, master = torch.randn(n), torch.randn(n).bfloat16(), torch.randn(n)
    target = torch.empty(n)
    seeds, part = list(range(30)), torch.randn(n // 8)
    return {
        "copy f32 (floor)": (lambda: target.copy_(f32), n),
        "torch f32: p.add_(s * torch.randn(p.shape))": (lambda: f32.add_(1e-3 * torch.randn(f32.shape)), n),
        "torch bf16: p.add_(s * torch.randn(p.shape))": (lambda: bf16.add_(1e-3 * torch.randn(bf16.shape, dtype=torch.bfloat16)), n),
        "perturb f32 in place": (lambda: es_kernels.add_noise_(f32, 1, 1e-3, name="w"), n),
        "perturb bf16 in place": (lambda: es_kernels.add_noise_(bf16, 1, 1e-3, name="w"), n),
        "perturb bf16 <- f32": (lambda: es_kernels.add_noise_(bf16, 1, 1e-3, master, name="w"), n),
        "update f32, 30 seeds": (lambda: es_kernels.add_noise_(part, seeds, [1e-3] * 30, name="w"), 30 * len(part)),
    }


def measure(n, threads, isa):
    torch.set_num_threads(threads)
    os.environ["ES_KERNELS_ISA"] = isa
    if not correct(isa):
        print(f"{isa}: wrong bits, not measured")
        return []
    runs = variants(n)
    seconds = {name: [] for name in runs}
    for round_ in range(ROUNDS + 1):
        for name, (function, _) in runs.items():
            start = time.perf_counter()
            function()
            if round_:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(s) for name, s in seconds.items()}
    rows = []
    for name, (_, normals) in runs.items():
        ns = median[name] / normals * 1e9
        rival = next((r for r in runs if r.startswith("torch bf16" if "bf16" in name else "torch f32")), None)
        speedup = median[rival] / runs[rival][1] / (median[name] / normals)
        p20, p80 = (sorted(seconds[name])[int(ROUNDS * q)] / normals * 1e9 for q in (0.2, 0.8))
        rows.append(dict(isa=isa, threads=threads, what=name, ns_per_value=ns, p20=p20, p80=p80, ratio_to_torch=speedup))
        print(f"{isa:9} {threads} thread{'s' * (threads > 1)}  {name:46} {ns:7.3f} ns a value  {speedup:6.2f} x torch")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results/cpu.json")
    parser.add_argument("--elements", type=int, default=1 << 24)
    args = parser.parse_args()
    rows = [row for isa in cpu.isas() for threads in sorted({1, os.cpu_count()}) for row in measure(args.elements, threads, isa)]
    with open("/proc/cpuinfo") as f:
        processor = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), platform.processor())
    report = {"processor": processor, "cores": os.cpu_count(), "torch": torch.__version__, "elements": args.elements, "rounds": ROUNDS, "rows": rows}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
