"""Contract: bench/speed/gpu.sh refuses to start without a GPU; a step that fails or hangs costs its own rows and
nothing else, and the summary says so. It takes sources without git and a Triton without metadata, and
compute-sanitizer is asked for what it can answer."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import types

import pytest
import torch

from bench import ROOT
from bench.common import baselines, environment

specification = importlib.util.spec_from_file_location("test_sanitizer", ROOT / "tests/gpu/test_sanitizer.py")
sanitizer = importlib.util.module_from_spec(specification)
specification.loader.exec_module(sanitizer)

# Plays python3 on a machine with a GPU: notes what it is asked to do.
STUB = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$*" in
  -) echo nvidia-stub;;
  *"-m pytest"*tests/gpu*) echo "1 failed"; exit 1;;
  *bench.speed.kernels*) trap 'echo "what there is" > "$CALLS.kept"; exit 1' INT; sleep 60;;
  *--tables*) echo "the tables";;
esac
"""


@pytest.fixture
def script(tmp_path):
    """Runs a copy of the script, whose kernels step may take six seconds, beside no sources; returns (the process,
    calls, summary)."""
    (tmp_path / "bench/speed").mkdir(parents=True)
    text = (ROOT / "bench/speed/gpu.sh").read_text()
    assert text.count("step kernels 160 ") == text.count("SECONDS + 510") == 1
    text = text.replace("step kernels 160 ", "step kernels 6 ")
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def run(*arguments, seconds=510):
        (tmp_path / "bench/speed/gpu.sh").write_text(text.replace("SECONDS + 510", f"SECONDS + {seconds}"))
        env = os.environ | {"PYTHON": str(stub), "CALLS": str(tmp_path / "calls")}
        done = subprocess.run(
            ["bash", "bench/speed/gpu.sh", *arguments],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=100,
        )
        calls = (tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else ""
        summary = tmp_path / "out/summary.md"
        return done, calls, summary.read_text() if summary.exists() else ""

    return run


def test_steps_that_fail_or_hang_do_not_stop_the_others(script, tmp_path):
    done, calls, summary = script("out")
    assert done.returncode == 1
    assert "| tests | failed, exit 1 |" in summary and "| sanitizer | failed, exit 1 |" in summary
    assert "| kernels | cut off after 6 s |" in summary
    assert (tmp_path / "calls.kept").read_text() == "what there is\n"  # it was interrupted first
    for name in ("versions", "build", "installed", "generation", "calls", "plots"):
        assert f"| {name} | ok |" in summary
    assert summary.endswith("the tables\n") and "no time" not in summary
    asked = calls.splitlines()
    steps = [call for call in asked if call != "-" and "import xdist" not in call]
    assert "environment.describe" in steps[0] and "setup.py" in steps[1]  # what is there, before anything is built
    assert "--benchmark-json" in calls and "calls-nvidia-stub.json" in calls
    of_tests = [call for call in asked if "tests/gpu" in call]
    assert len(of_tests) == 3 and all(" -v " in call for call in of_tests)
    assert [call for call in of_tests if "test_sanitizer" in call and "--ignore" not in call]


def test_steps_can_be_named(script):
    done, calls, summary = script("out", "calls", "build")
    assert done.returncode == 0
    assert (
        "| build | ok |" in summary
        and "| calls | ok |" in summary
        and "kernels" not in summary
        and "bench.speed.kernels" not in calls
    )


def test_what_there_was_no_time_for_is_named(script):
    done, _, summary = script("out", "build", "sanitizer", seconds=4)
    assert done.returncode == 1 and "| sanitizer | left out, no time |" in summary
    assert "Run them alone: bash bench/speed/gpu.sh out build sanitizer" in summary


@pytest.mark.parametrize(
    "arguments, words", [((), "usage"), (("out", "kernel"), "there is no step kernel; there are versions build")]
)
def test_arguments_that_make_no_sense(script, tmp_path, arguments, words):
    done, calls, _ = script(*arguments)
    assert done.returncode == 2 and words in done.stdout and not calls and not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_nothing_starts(tmp_path):
    done = subprocess.run(
        ["bash", str(ROOT / "bench/speed/gpu.sh"), str(tmp_path / "out")],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "torch sees no CUDA device" in done.stderr


# ---- what is measured on ----


@pytest.fixture
def gpu(monkeypatch):
    """torch as it is on a machine with a GPU, as far as environment.describe() asks."""
    properties = types.SimpleNamespace(
        name="NVIDIA H200", multi_processor_count=132, L2_cache_size=1, major=9, minor=0, total_memory=1
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def test_neither_git_nor_tritons_metadata_is_needed(gpu, monkeypatch):
    def not_registered(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_registered)
    monkeypatch.setenv("PATH", "")
    facts = environment.describe("cuda")
    assert (
        facts["commit"] is None
        and facts["triton"] == getattr(baselines.triton, "__version__", None)
        and facts["capability"] == "sm_90"
    )


def test_an_archive_inside_another_repository_has_no_commit(monkeypatch):
    monkeypatch.setattr(environment, "ROOT", ROOT / "bench")
    assert environment._commit() is None


# ---- compute-sanitizer ----


def test_compute_sanitizer_is_asked_for_what_it_can_answer():
    """initcheck must see who writes what is read: with a filter it would take what torch has written for uninitialised.
    CUDA calls that fail by design (torch probes) are no finding. Our kernels' names are what the filter looks for."""
    for check in sanitizer.CHECKS:
        command = sanitizer.command("compute-sanitizer", check)
        assert (
            command[command.index("--tool") + 1] == check and command[command.index("--report-api-errors") + 1] == "no"
        )
        assert ("--kernel-name" in command) == (check != "initcheck") and "--kernel-regex" not in command
    names = "|".join(
        re.findall(r"__global__ void __launch_bounds__\(.*\) (\w+)\(", (ROOT / "csrc/cuda.cu").read_text())
    )
    assert sanitizer.command("compute-sanitizer", "memcheck")[-4:-3] == [f"regex={names}"]


def test_what_compute_sanitizer_runs_reaches_every_path():
    """On the CPU, where the same calls are refused or not as on a GPU."""
    exec(sanitizer.PROGRAM.replace('"cuda"', '"cpu"').replace("torch.cuda.synchronize()", ""), {})
