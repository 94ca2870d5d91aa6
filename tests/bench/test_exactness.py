"""Contract: bench/exactness.py does what the paper's code does (in its order and roundings), measures step / ulp in bf16's ulps, gives every way
of keeping weights the same noise and questions, and pairs differences by seed."""

import json
import pathlib
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "bench"))
import exactness

import es_kernels
from es_kernels.noise import MEMBER_NOISE, member_seed


def noise(name, like, member):
    zeros = torch.zeros_like(like)
    return es_kernels.add_noise_(zeros, member_seed(3, 0, member, MEMBER_NOISE), 1.0, name=name)


def test_add_then_subtract_is_the_papers_sequence():
    start = torch.randn(500, generator=torch.Generator().manual_seed(0)).bfloat16()
    w, seen, expected = start.clone(), [], start.clone()
    es = exactness.AddThenSubtract({"w": w}, sigma=0.01, lr=0.02, population=3, seed=3)
    rewards = iter([1.0, 2.0, 6.0])
    es.step(lambda: (seen.append(w.clone()), next(rewards))[1])
    for member in range(3):
        expected = expected + 0.01 * noise("w", w, member)
        assert torch.equal(seen[member], expected)
        expected = expected - 0.01 * noise("w", w, member)
    total = torch.zeros(500)
    for member, z in enumerate([-2.0, -1.0, 3.0]):  # over a standard deviation of sqrt(14 / 3)
        total.add_(noise("w", w, member), alpha=0.02 / 3 * z / (14 / 3) ** 0.5)
    expected = (expected.float() + total).bfloat16()
    torch.testing.assert_close(w.float(), expected.float(), rtol=0, atol=2**-7 * 4 * 2**-3)
    assert (w == expected).double().mean() > 0.99 and not torch.equal(w, start)


def test_step_over_ulp():
    weights = torch.tensor([1.0, 1.99, 2.0, 0.02, -0.02])
    ulps = torch.tensor([2.0**-7, 2.0**-7, 2.0**-6, 2.0**-13, 2.0**-13], dtype=torch.double)
    assert torch.equal(exactness.step_over_ulp(weights, 1.0), 1 / ulps)
    for w, ulp in zip(weights.bfloat16(), ulps):
        assert torch.nextafter(w.abs(), torch.tensor(9.0).bfloat16()).double() - w.abs().double() == ulp


def test_every_way_sees_the_same_noise_and_questions(monkeypatch):
    monkeypatch.setattr(exactness, "LOOK_EVERY", 1)
    seen = {}
    for way in ("f32 weights", "bf16, base fp32"):
        right = exactness.Questions.reward
        monkeypatch.setattr(
            exactness.Questions,
            "reward",
            lambda self, model, rows, way=way: seen.setdefault(way, []).append(rows.tolist()) or right(self, model, rows),
        )
        found = exactness.run(way, 0, 1)
        monkeypatch.setattr(exactness.Questions, "reward", right)
        assert found["way"] == way and len(found["curve"]) == 2 and found["curve"][0] == pytest.approx(0.41, abs=0.01)
    assert seen["f32 weights"] == seen["bf16, base fp32"] and len(seen["f32 weights"]) == exactness.POPULATION


def test_differences_are_paired_by_seed(monkeypatch):
    monkeypatch.setattr(exactness, "MIDWAY", exactness.LOOK_EVERY)
    curves = {"bf16, base fp32": [[0.4, 0.5, 0.8], [0.4, 0.6, 0.9]], "bf16, base None": [[0.4, 0.4, 0.7], [0.4, 0.5, 0.8]]}
    runs = [{"way": way, "seed": seed, "curve": curves.get(way, [[0.4, 0.5, 0.6]] * 2)[seed]} for seed in (1, 0) for way in exactness.WAYS]
    rows = {row["way"]: row for row in exactness.summary(runs)}
    drifting = rows["bf16, base None"]["end"]
    assert drifting["difference"] == pytest.approx(-0.1) and drifting["difference_error"] == pytest.approx(0)  # the same in each seed
    assert drifting["error"] == pytest.approx(0.05) and rows["bf16, base None"]["midway"]["mean"] == pytest.approx(0.45)


def test_the_committed_run_is_in_the_regime_it_speaks_of():
    report = json.loads((pathlib.Path(exactness.__file__).parent / "results/exactness.json").read_text())
    assert 0.5 <= report["add_then_subtract"]["step_over_ulp"]["0.5"] <= 1
    assert report["setting"]["seeds"] >= 5 and report["setting"]["generations"] >= 200
    assert {row["way"] for row in report["rows"]} == set(exactness.WAYS)
    assert len(report["runs"]) == len(exactness.WAYS) * report["setting"]["seeds"]
    for row, again in zip(report["rows"], exactness.summary(report["runs"]), strict=True):
        assert row["end"] == pytest.approx(again["end"]) and row["midway"] == pytest.approx(again["midway"])
