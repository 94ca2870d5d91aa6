"""Contract: a generation is the sum of its parts; break-even inverts that sum; what was extrapolated says so; a run writes whole rows."""

import json
import pathlib
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "bench"))
import generation
import rivals
import shapes
import ways


def test_a_generation_is_the_sum_of_its_parts():
    found = generation.generation(30, weights=0.1, answers=2.0, rewards=0.5, update=3.0)
    assert found == {"weights": 3.0, "answers": 60.0, "rewards": 15.0, "update": 3.0, "total": 81.0, "share_of_weights": 6 / 81}


def test_break_even_inverts_the_sum():
    tokens = generation.break_even(0.1, weights=0.2, update=3.0, population=30, first=0.1, a_token=0.01)
    # 0.3 s a member are a tenth where answers take 2.7 s: 260 tokens after the first.
    assert tokens == 261
    answers = generation.extrapolated(0.1, 0.1 + 0.01 * (generation.LENGTHS[1] - generation.LENGTHS[0]), tokens)
    assert generation.generation(30, 0.2, answers, 0.0, 3.0)["share_of_weights"] == pytest.approx(0.1, rel=0.01)
    assert generation.break_even(0.1, weights=0.001, update=0.0, population=30, first=1.0, a_token=0.01) == 0


def test_bytes_and_cache_of_a_model():
    found = generation.memory("Qwen2.5-7B")
    assert found["fp32"]["bytes"] == 4 * 7_615_616_512 and found["copy"]["bytes"] == 2 * 7_615_616_512 and found["None"]["bytes"] == 0
    assert found["kv_bytes_a_token"] == 2 * 28 * 4 * 128 * 2 and found["copy"]["kv_tokens"] == 2 * 7_615_616_512 // 57_344


@pytest.mark.parametrize("name", [*rivals.available("cpu"), "es_kernels, base fp32", "es_kernels, base copy", "es_kernels, base None"])
def test_every_way_does_its_member_and_its_update(name):
    live = {"a": torch.zeros(64, 33, dtype=torch.bfloat16), "b": torch.zeros(77, dtype=torch.bfloat16)}
    way = ways.ways(live)[name]
    way.update(*ways.coefficients(4))
    assert all((p != 0).double().mean() > 0.9 for p in live.values())
    before = {key: p.clone() for key, p in live.items()}
    way.member()
    moved = max((p - before[key]).float().abs().max() for key, p in live.items())
    if name.startswith("es_kernels"):  # the next member's weights: nothing has to be undone
        assert ways.SIGMA < moved < 8 * ways.SIGMA
    else:  # undone, up to bf16
        assert moved < 0.1 * ways.SIGMA


def test_a_run_writes_whole_rows(monkeypatch, tmp_path):
    monkeypatch.setitem(shapes.MODELS, "tiny", shapes.Shape("qwen2", 64, 2, 96, 4, 2, 128, True))
    monkeypatch.setitem(generation.MODELS, "cpu", ["tiny"])
    short = [generation.Workload("one token", 4, 8, 1), generation.Workload("given", 4, 8, 0, 2, 1), generation.Workload("long", 4, 8, 40)]
    monkeypatch.setattr(generation, "WORKLOADS", short)
    monkeypatch.setattr(
        generation.Clock, "answers", lambda self, work, right=generation.Clock.answers: (1.5, False) if work.name == "long" else right(self, work)
    )
    monkeypatch.setattr(sys, "argv", ["generation.py", "--device", "cpu", "--out", str(tmp_path)])
    generation.main()
    report = json.loads((tmp_path / "generation-cpu.json").read_text())
    assert {(r["workload"], r["way"]) for r in report["generations"]} == {
        (w.name, way) for w in short for way in (*generation.THEIRS, "es_kernels, base fp32", "es_kernels, base copy", "es_kernels, base None")
    }
    for row in report["generations"]:
        assert row["total"] == pytest.approx(row["weights"] + row["answers"] + row["rewards"] + row["update"])
        assert row["answers_measured"] == (row["workload"] != "long")
    assert all(row["times_reference"] == 1 for row in report["generations"] if row["way"] == generation.REFERENCE)
    assert not report["left_out"]


def test_without_time_what_is_left_out_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(shapes.MODELS, "tiny", shapes.Shape("qwen2", 64, 2, 96, 4, 2, 128, True))
    monkeypatch.setitem(generation.MODELS, "cpu", ["tiny"])
    monkeypatch.setattr(sys, "argv", ["generation.py", "--device", "cpu", "--out", str(tmp_path), "--seconds", "0"])
    generation.main()
    assert "left out: tiny: countdown, 1024 tokens" in capsys.readouterr().err
