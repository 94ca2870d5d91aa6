"""Contract: compute-sanitizer's memcheck, racecheck and initcheck find nothing in the CUDA kernels, at sizes that reach every path."""

import shutil
import subprocess
import sys

import pytest

PROGRAM = """
import torch
from es_kernels import ParamTable, add_noise_, fingerprint
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for n in (1, 9, 20_011):
        t = torch.zeros(n + 1, dtype=dtype, device="cuda")[1:]
        aligned = torch.zeros(n, dtype=dtype, device="cuda")
        table = ParamTable({"a": t, "b": aligned})
        for seeds in ([], [1], [1, 2], list(range(200))):
            for extra in ({}, dict(rounding="stochastic", rounding_seed=3), dict(decay=0.1, anchor={"a": t.clone(), "b": aligned.clone()})):
                add_noise_(table, seeds, [0.1] * len(seeds), **extra)
        fingerprint(table)
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("check", ["memcheck", "racecheck", "initcheck"])
def test_sanitizer_is_clean(check):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if not sanitizer:
        pytest.skip("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    command = [sanitizer, "--tool", check, "--error-exitcode", "9", "--kernel-regex", "kns=perturb", "--kernel-regex", "kns=update"]
    command += ["--kernel-regex", "kns=fingerprint", sys.executable, "-c", PROGRAM]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
