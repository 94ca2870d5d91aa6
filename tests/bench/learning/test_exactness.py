"""Contract: bench/learning/exactness.py does what the paper's code does (in its order and roundings), measures step
/ ulp in bf16's ulps, gives every way of keeping weights the same noise and questions, evaluates what the task calls
exact, and pairs differences by seed."""

import json

import pytest
import torch

import es_kernels
from bench import RESULTS
from bench.learning import exactness
from es_finetune.engines.hf import HFEngine
from es_finetune.tasks.countdown_char import CountdownChar
from es_kernels.noise import MEMBER_NOISE, member_seed


def noise(like, member):
    return es_kernels.add_noise_(torch.zeros_like(like), member_seed(3, 0, member, MEMBER_NOISE), 1.0, name="w")


def test_add_then_subtract_is_the_papers_sequence():
    start = torch.randn(500, generator=torch.Generator().manual_seed(0)).bfloat16()
    w, seen, expected = start.clone(), [], start.clone()
    rewards = iter([1.0, 2.0, 6.0])
    es = exactness.AddThenSubtract({"w": w}, sigma=0.01, lr=0.02, population=3, seed=3)
    assert es.step(lambda: (seen.append(w.clone()), next(rewards))[1]) == 3
    for member in range(3):
        expected.add_(0.01 * noise(w, member))
        assert torch.equal(seen[member], expected)
        expected.sub_(0.01 * noise(w, member))
    assert not torch.equal(expected, start)
    total = torch.zeros(500)
    for member, z in enumerate([-2.0, -1.0, 3.0]):  # over a standard deviation of sqrt(14 / 3)
        total.add_(noise(w, member), alpha=0.02 / 3 * z / (14 / 3) ** 0.5)
    assert torch.equal(w, expected + total.bfloat16())


def test_step_over_ulp():
    weights = torch.tensor([1.0, 1.99, 2.0, 0.02, -0.02])
    ulps = torch.tensor([2.0**-7, 2.0**-7, 2.0**-6, 2.0**-13, 2.0**-13], dtype=torch.double)
    assert torch.equal(exactness.step_over_ulp(weights, 1.0), 1 / ulps)
    for w, ulp in zip(weights.bfloat16(), ulps, strict=True):
        assert torch.nextafter(w.abs(), torch.tensor(9.0).bfloat16()).double() - w.abs().double() == ulp


def test_every_way_starts_alike_and_sees_the_same_noise_and_questions(monkeypatch):
    monkeypatch.setattr(exactness, "POPULATION", 2)
    reward, seen = (
        exactness.Questions.reward,
        {way: [] for way in ("f32 weights", "bf16, master None", "bf16, add then subtract")},
    )

    def watched(self, model, rows=None):
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        seen[way].append((weights, rows))
        return reward(self, model, slice(None) if rows is None else rows)

    monkeypatch.setattr(exactness.Questions, "reward", watched)
    for way in seen:
        result = exactness.run(way, 0, 1)
        assert result["way"] == way and len(result["curve"]) == len(result["log_p"]) == 1
    exact, *others = seen.values()
    for other in others:
        assert torch.equal(exact[0][0], other[0][0])  # the evaluation before the first generation
        for (mine, rows), (theirs, their_rows) in zip(exact[1:], other[1:], strict=True):
            assert torch.equal(rows, their_rows)
            assert torch.corrcoef(torch.stack([mine - exact[0][0], theirs - exact[0][0]]))[0, 1] > 0.9  # bf16 rounds it
    assert len(exact) == 3


def test_right_is_what_the_task_calls_exact():
    model, tokenizer, _ = exactness.embedded(torch.float32)
    task = CountdownChar()
    engine = HFEngine(model, tokenizer, max_new_tokens=12, batch_size=len(task.test))
    answers = engine.generate(engine.encode([item.prompt for item in task.test]))
    exact = sum(task.score(item, answer.text).exact for item, answer in zip(task.test, answers, strict=True)) / len(
        task.test
    )
    assert exactness.Questions(task.test, tokenizer, all_answers=True).right(model) == pytest.approx(exact)


def test_only_inexact_ways_leave_something_behind():
    assert exactness.left_behind("bf16, master fp32") == {"changed": 0, "error_over_step": 0}
    assert exactness.left_behind("bf16, add then subtract")["changed"] > 0.3


def test_a_run_that_ended_is_not_made_again(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(exactness, "run", lambda *which: made.append(which) or {"seed": which[1]})
    which = [("f32 weights", 0, 20), ("f32 weights", 1, 20), ("bf16, master None", 0, 20), ("f32 weights", 0, 30)]
    assert [exactness.kept(tmp_path, *w)["seed"] for w in which * 2] == [0, 1, 0, 0] * 2
    assert made == which


def test_differences_are_paired_by_seed(monkeypatch):
    monkeypatch.setattr(exactness, "MIDWAY", exactness.EVAL_EVERY)
    curves = {
        "bf16, master fp32": [[0.4, 0.5, 0.8], [0.4, 0.6, 0.9]],
        "bf16, master None": [[0.4, 0.4, 0.7], [0.4, 0.5, 0.8]],
    }
    runs = []
    for way in exactness.WAYS:
        for seed in (0, 1) if way == exactness.REFERENCE else (1, 0):
            curve = curves.get(way, [[0.4, 0.5, 0.6]] * 2)[seed]
            runs.append({"way": way, "seed": seed, "curve": curve, "log_p": [-2 * share for share in curve]})
    drifting = {row["way"]: row for row in exactness.summary(runs)}["bf16, master None"]
    # The same in each seed
    assert drifting["end"] == pytest.approx({"mean": 0.75, "error": 0.05, "difference": -0.1, "difference_error": 0})
    assert drifting["midway"]["mean"] == pytest.approx(0.45) and drifting["mean"] == pytest.approx([0.4, 0.45, 0.75])
    assert drifting["log_p"]["end"]["difference"] == pytest.approx(0.2) and drifting["log_p"]["error"] == pytest.approx(
        [0, 0.1, 0.1]
    )


def test_the_committed_run_is_in_the_regime_it_speaks_of():
    report = json.loads((RESULTS / "exactness.json").read_text())
    assert 0.5 <= report["add_then_subtract"]["step_over_ulp"]["0.5"] <= 1
    assert report["setting"]["seeds"] >= 5 and report["setting"]["generations"] >= 200
    assert len(report["runs"]) == len(exactness.WAYS) * report["setting"]["seeds"]
    for row, again in zip(report["rows"], exactness.summary(report["runs"]), strict=True):
        for published, expected in ((row, again), (row["log_p"], again["log_p"])):
            assert all(
                published[look] == pytest.approx(expected[look], abs=1e-12)
                for look in ("mean", "error", "midway", "end")
            )
