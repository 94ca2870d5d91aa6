"""Contract: bench/speed/bench_calls.py measures single calls by pytest-benchmark, behind the gate, and each row
says what it moved."""

import json
import os
import subprocess
import sys

import pytest
import torch

from bench import ROOT
from es_kernels import backends

pytestmark = pytest.mark.skipif(
    backends.unavailable("cpu", torch.device("cpu")) is not None, reason="the CPU library was not built"
)


def run(tmp_path, cases):
    # A process of its own: the calls are pytest's tests themselves. CPU calls, also where there is a GPU.
    # pytest-benchmark measures nothing where it takes itself for one of pytest-xdist's workers.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    env |= {"PYTHONPATH": f"{ROOT}:{ROOT}/python", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "bench/speed/bench_calls.py",
        "-k",
        cases,
        "--benchmark-json",
        str(tmp_path / "calls.json"),
    ]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_a_row_says_what_was_measured(tmp_path):
    done = run(tmp_path, "(65536 and bf16 and f32 and not stochastic and not update) or (form and bare)")
    assert done.returncode == 0, done.stdout
    report = json.loads((tmp_path / "calls.json").read_text())
    assert report["machine_info"]["processor"] and "commit" in report["machine_info"]
    rows = {row["extra_info"].get("operation", row["extra_info"].get("form")): row for row in report["benchmarks"]}
    assert set(rows) == {"perturb bf16 <- f32", "restore bf16 <- f32", "a bare tensor", "290 bare tensors"}
    perturb = rows["perturb bf16 <- f32"]
    assert perturb["extra_info"]["bytes"] == 6 * 65536
    assert perturb["extra_info"]["normals_per_s"] == pytest.approx(65536 / perturb["stats"]["median"])
