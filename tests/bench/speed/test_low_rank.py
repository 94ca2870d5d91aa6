"""Contract: bench/speed/low_rank.py writes whole rows, with what each is compared with, and gives none to a kernel with
wrong bits."""

import json
import sys

import pytest
import torch

from bench.common import shapes
from bench.speed import low_rank
from es_kernels import backends
from es_kernels.backends import cpu

pytestmark = [
    pytest.mark.skipif(
        backends.unavailable("cpu", torch.device("cpu")) is not None, reason="the CPU library was not built"
    ),
    pytest.mark.usefixtures("little_garbage"),
]


@pytest.fixture
def small(monkeypatch, tmp_path):
    """main() on matrices of some thousand elements; returns a function that runs it and reads the file."""
    monkeypatch.setattr(low_rank, "SQUARES", {"cpu": {1: 40, 3: 40, 5: 24}})
    monkeypatch.setattr(low_rank, "MODEL", {"cpu": "tiny"})
    monkeypatch.setitem(shapes.MODELS, "tiny", shapes.Shape("qwen2", 64, 2, 96, 4, 2, 128, True))
    threads = torch.get_num_threads()
    monkeypatch.setenv("ES_KERNELS_ISA", "baseline")  # main() sets it: restored afterwards

    def run():
        monkeypatch.setattr(sys, "argv", ["low_rank.py", "--device", "cpu", "--out", str(tmp_path)])
        try:
            low_rank.main()
        finally:
            torch.set_num_threads(threads)
        return json.loads((tmp_path / "low_rank-cpu.json").read_text())

    return run


def test_rows_are_whole(small):
    content = small()
    assert content["wrong"] == [] and content["machine"]["processor"]
    found = {(r["isa"], r["threads"], r["on"], r["operation"]): r for r in content["rows"]}
    assert len(found) == len(content["rows"])
    for (isa, threads, on, operation), row in found.items():
        assert row["p20"] <= row["seconds"] <= row["p80"]
        if row["what"] == "perturb":
            restore = found[isa, threads, on, f"restore {row['out']} <- f32"]
            assert row["times_restore"] == pytest.approx(row["seconds"] / restore["seconds"])
        if row["noise_rank"]:
            full = found[isa, threads, on, operation.replace(f", rank {row['noise_rank']}", "")]
            assert row["full_noise_takes"] == pytest.approx(full["seconds"] / row["seconds"])
        if threads > 1:
            assert row["one_thread_takes"] == pytest.approx(found[isa, 1, on, operation]["seconds"] / row["seconds"])
    assert {row["noise_rank"] for row in content["rows"]} == set(low_rank.RANKS)
    assert {row["on"] for row in content["rows"]} == {"square", "tiny"}
    assert {row["isa"] for row in content["rows"]} == set(cpu.isas())


def test_wrong_bits_get_no_row(small, monkeypatch, tmp_path):
    monkeypatch.setattr(low_rank, "right", lambda operation, *_: operation.noise_rank != 1)
    with pytest.raises(SystemExit, match="wrong bits: .*rank 1"):
        small()
    rows = json.loads((tmp_path / "low_rank-cpu.json").read_text())["rows"]
    assert {row["noise_rank"] for row in rows} == set(low_rank.RANKS) - {1}
