"""Contract: compute-sanitizer's memcheck, racecheck and initcheck find nothing in the CUDA kernels, at sizes that reach
every path."""

import os
import shutil
import subprocess
import sys

import pytest

CHECKS = ("memcheck", "racecheck", "initcheck")
PROGRAM = """
import torch
import es_kernels
from es_kernels import ParamTable, Segment, add_noise_, factors, fingerprint
with es_kernels.backend("cuda"):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for n in (1, 9, 20_011):
            t = torch.zeros(n + 1, dtype=dtype, device="cuda")[1:]
            aligned, rows = (torch.zeros(size, dtype=dtype, device="cuda") for size in (n, 3 * n))
            strided = Segment("c", 3, n, index_stride=2 * n)
            named = [("a", t, [Segment("a", 1, n)]), ("b", aligned, [Segment("b", 1, n)]), ("c", rows, [strided])]
            table = ParamTable(named)
            base, anchor = ({name: t.to(to, copy=True) for name, t, _ in named} for to in (torch.float32, dtype))
            stochastic, anchored = dict(rounding="stochastic", rounding_seed=3), dict(decay=0.1, anchor=anchor)
            for seeds in ([], [1], [1, 2], list(range(200))):
                for extra in ({}, dict(base=base), stochastic, anchored):
                    add_noise_(table, seeds, [0.1] * len(seeds), **extra)
            fingerprint(table)
        matrices = {"m": torch.zeros(130, 264, dtype=dtype, device="cuda"), "v": aligned}
        matrices["odd"] = torch.zeros(129, 257, dtype=dtype, device="cuda")[:, 3:]
        for rank in (1, 3, 20):
            for seeds in ([], [1], list(range(200))):
                for extra in ({}, stochastic, dict(decay=0.1)):
                    add_noise_(matrices, seeds, [0.1] * len(seeds), noise_rank=rank, **extra)
            factors({"a": (40, 8), "b": (7, 3)}, [1, 2, 3], rank, dtype=dtype, device="cuda")
torch.cuda.synchronize()
"""


def command(sanitizer, check):
    """initcheck sees every kernel: what one that is filtered out has written it would take for uninitialised."""
    only_ours = (
        [] if check == "initcheck" else ["--kernel-name", "regex=perturb|update|low_rank|write_factors|fingerprint"]
    )
    options = ["--tool", check, "--error-exitcode", "9", "--report-api-errors", "no", "--print-limit", "20", *only_ours]
    return [sanitizer, *options, sys.executable, "-c", PROGRAM]


@pytest.mark.parametrize("check", CHECKS)
def test_sanitizer_is_clean(check):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if not sanitizer:
        pytest.skip("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    # Each tensor an allocation of its own: in torch's cached blocks of 2 MB a store past the end would meet memory that
    # is another tensor's.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    run = subprocess.run(command(sanitizer, check), env=env, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
