"""Contract: bench/gpu.sh refuses to start without a GPU; a step that fails or hangs costs its own rows and nothing else, and the summary says so."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[2]

# Plays python3 on a machine with a GPU: notes what it is asked to do.
STUB = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$*" in
  *slug*) echo nvidia-stub;;
  *"-m pytest"*tests/gpu*) echo "1 failed"; exit 1;;
  *kernels.py*) sleep 60;;
  *--tables*) echo "the tables";;
esac
"""


@pytest.fixture
def script(tmp_path):
    """Runs a copy of the script, whose kernels step may take six seconds, beside no sources; returns (exit code, output, calls, summary)."""
    (tmp_path / "bench").mkdir()
    text = (ROOT / "bench/gpu.sh").read_text()
    assert text.count("step kernels 150 ") == 1
    (tmp_path / "bench/gpu.sh").write_text(text.replace("step kernels 150 ", "step kernels 6 "))
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def run(*arguments):
        env = os.environ | {"PYTHON": str(stub), "CALLS": str(tmp_path / "calls")}
        done = subprocess.run(["bash", "bench/gpu.sh", *arguments], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
        calls = (tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else ""
        summary = tmp_path / "out/summary.md"
        return done, calls, summary.read_text() if summary.exists() else ""

    return run


def test_steps_that_fail_or_hang_do_not_stop_the_others(script):
    done, calls, summary = script("out")
    assert done.returncode == 1
    assert "| tests/gpu, with compute-sanitizer | failed, exit 1 |" in summary
    assert "| kernels | cut off after 6 s |" in summary
    assert "| build | ok |" in summary and "| generation | ok |" in summary and "| calls | ok |" in summary and "| plots | ok |" in summary
    assert summary.endswith("the tables\n")
    assert "--benchmark-json" in calls and "calls-nvidia-stub.json" in calls


def test_a_folder_must_be_named(script):
    done, calls, _ = script()
    assert done.returncode == 2 and "usage" in done.stdout and not calls


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_nothing_starts(tmp_path):
    done = subprocess.run(
        ["bash", str(ROOT / "bench/gpu.sh"), str(tmp_path / "out")], env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert done.returncode == 2 and "torch sees no CUDA device" in done.stderr
