"""Contract: the tables and plots of README.md, bench/README.md and docs/ are those of bench/results, and the tables of
a GPU's results, which are not there yet, can be made."""

import json
import subprocess
import sys

import pytest

from bench import ROOT
from bench.publish import plots, tables


def test_the_pages_show_the_results():
    run = subprocess.run(
        [sys.executable, "-m", "bench.publish.tables", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_the_readme_tells_the_hours_that_are_predicted():
    row = next(line for line in tables.hours().splitlines() if line.startswith("| Qwen2.5-1.5B"))
    memory, _, h100 = row.split(" | ")[1:4]
    model, master = memory.removesuffix(" GB").split(" + ")
    told = f"takes {model} GB and its exact weights {master} GB more"
    text = (ROOT / "README.md").read_text()
    assert told in text and f": {h100.removesuffix(' h')} on an H100 at least, predicted" in text


def test_every_table_has_its_place():
    text = "".join((ROOT / page).read_text() for page in tables.PAGES)
    assert all(text.count(f"<!-- {name} -->\n") == 1 for name in tables.TABLES)


def test_plots_show_the_results():
    assert [name for name in plots.PLOTS if not plots.is_current(name)] == []
    text = "".join(path.read_text() for path in (ROOT / "docs").rglob("*.md"))
    assert all(f"/{name}.png)" in text for name in plots.PLOTS)


def test_a_plot_of_other_results_is_noticed(monkeypatch, tmp_path):
    results = json.loads((plots.RESULTS / "exactness.json").read_text())
    monkeypatch.setattr(plots, "RESULTS", tmp_path)
    (tmp_path / "exactness.json").write_text(json.dumps(results | {"another": 1}))
    assert not plots.is_current("exactness")


@pytest.fixture
def gpu_results(tmp_path):
    """A folder as gpu.sh leaves it: the CPU's rows as those of two GPU backends."""
    report = json.loads((ROOT / "bench/results/kernels-cpu.json").read_text())
    report["machine"] |= {"gpu": "NVIDIA H200", "driver": "580", "triton": "3.6.0"}
    calls = [
        row | {"isa": None, "threads": None}
        for row in report["calls"]
        if row.get("threads") != 1 and row["isa"] == report["calls"][0]["isa"]
    ]
    report["calls"] = [row | {"backend": b, "share_of_issue": 0.5} for row in calls for b in ("cuda", "triton")]
    (tmp_path / "kernels-nvidia-h200.json").write_text(json.dumps(report))
    generation = (ROOT / "bench/results/generation-cpu.json").read_text()
    (tmp_path / "generation-nvidia-h200.json").write_text(generation)
    return tmp_path


def test_the_tables_of_a_gpu(gpu_results, monkeypatch):
    run = subprocess.run(
        [sys.executable, "-m", "bench.publish.tables", "--tables", gpu_results],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert (
        "NVIDIA H200, driver 580" in run.stdout
        and "| perturb bf16 <- f32 | cuda |" in run.stdout
        and "| perturb bf16 <- f32 | triton |" in run.stdout
    )
    assert "| es-at-scale |" in run.stdout and "es-at-scale: a tenth" in run.stdout
    monkeypatch.setattr(tables, "RESULTS", gpu_results)
    assert tables.measured_gpus() in run.stdout


def test_what_a_gpu_could_not_hold_or_queue_is_said():
    row = {
        "model": "m",
        "what": "member",
        "seeds": 1,
        "times_ours": 1.0,
        "peak_extra_bytes": 0,
        "seconds": 0.01,
        "host_seconds": 0.002,
        "queued": True,
    }
    rows = [row | {"who": who} for who in ("ours", "torch._foreach")] + [row | {"who": "es-at-scale", "queued": False}]
    rows.append(row | {"who": "ours", "what": "update", "seeds": 30})
    why = [
        {
            "kind": "rivals",
            "model": "m",
            "who": "torch._foreach",
            "what": "update",
            "why": "needs 45.7 GB, 21.5 GB can be had",
        }
    ]
    lines = tables.baselines({"rivals": rows, "left_out": why}).splitlines()
    assert lines[2].startswith("| ours | 0.01 (host 0.002) |")
    assert lines[3].endswith("| needs 45.7 GB, 21.5 GB can be had |  |  |")
    assert lines[4].startswith("| es-at-scale | 0.01 (waits) |") and lines[4].endswith("|  |  |  |")


def test_the_plots_of_a_gpu(gpu_results, tmp_path):
    plots.draw_folder(gpu_results, tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_the_tables_and_plots_of_a_run_that_was_cut_off(tmp_path):
    nothing = {"machine": {"gpu": "NVIDIA H200", "driver": "580"}, "calls": [], "tables": [], "rivals": []}
    (tmp_path / "kernels-nvidia-h200.json").write_text(json.dumps(nothing))
    run = subprocess.run(
        [sys.executable, "-m", "bench.publish.tables", "--tables", tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    plots.draw_folder(tmp_path, tmp_path / "one.png")
    assert (tmp_path / "one.png").exists()
