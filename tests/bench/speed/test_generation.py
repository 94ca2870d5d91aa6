"""Contract: a generation is the sum of its parts; break-even inverts that sum; what was extrapolated says so, and from
what; every method does its work on every parameter; a run writes whole rows, and what fails or has no time costs
nothing else."""

import json
import sys

import pytest
import torch

from bench.common import baselines, methods, shapes
from bench.publish import tables
from bench.speed import generation, generation_cost

OURS = ("es_kernels, master fp32", "es_kernels, master copy", "es_kernels, master None")


def test_a_generation_is_the_sum_of_its_parts():
    parts = generation.generation(30, weights=0.1, answers=2.0, rewards=0.5, update=3.0)
    assert parts == {
        "weights": 3.0,
        "answers": 60.0,
        "rewards": 15.0,
        "update": 3.0,
        "total": 81.0,
        "share_of_weights": 6 / 81,
    }


def test_break_even_inverts_the_sum():
    def answers(tokens):
        return 0.1 + 0.01 * (tokens - 1)

    tokens = generation.break_even(0.1, weights=0.2, update=3.0, population=30, answers=answers)
    # 0.3 s a member are a tenth where answers take 2.7 s: 260 tokens after the first.
    assert tokens == 261
    assert generation.generation(30, 0.2, answers(tokens), 0.0, 3.0)["share_of_weights"] == pytest.approx(0.1)
    assert generation.break_even(0.1, weights=0.001, update=0.0, population=30, answers=answers) == 1
    # Ends, if a token costs nothing
    assert generation.break_even(0.1, weights=0.2, update=3.0, population=30, answers=lambda tokens: 0.1) >= 1 << 30


def test_longer_answers_are_extrapolated_by_what_they_cost_at_length():
    def parabola(n):
        return 2 + 3 * n + 0.5 * n * n

    points = {n: parabola(n) for n in (1, 32, 128)}
    assert generation_cost.extrapolated(points, 1024) == pytest.approx(parabola(1024))
    assert generation_cost.extrapolated(points, 80) == pytest.approx(
        (parabola(32) + parabola(128)) / 2
    )  # 80 is half way
    assert generation_cost.extrapolated(points, 128) == parabola(128)
    assert generation_cost.extrapolated({1: 1.0, 3: 2.0}, 9) == pytest.approx(5.0)
    # The parabola would come down again
    assert generation_cost.extrapolated({1: 0.0, 2: 10.0, 3: 11.0}, 5) == pytest.approx(13.0)


def test_bytes_and_cache_of_a_model():
    values, largest = 7_615_616_512, 152_064 * 3584
    row = generation.memory("Qwen2.5-7B", gpu_bytes=10**11)
    assert row["fp32"]["bytes"] == 4 * values and row["copy"]["bytes"] == 2 * values and row["None"]["bytes"] == 0
    assert row["kv_bytes_a_token"] == 2 * 28 * 4 * 128 * 2 and row["copy"]["kv_tokens"] == 2 * values // 57_344
    assert row["es-at-scale"]["bytes"] == 6 * largest and row["fp32"]["share_of_gpu"] == pytest.approx(
        4 * values / 1e11
    )
    assert "share_of_gpu" not in generation.memory("Qwen2.5-7B")["fp32"]


@pytest.mark.parametrize("name", [*baselines.available("cpu"), *OURS])
def test_every_method_does_its_member_and_its_update(name):
    live = {"a": torch.zeros(64, 33, dtype=torch.bfloat16), "b": torch.zeros(77, dtype=torch.bfloat16)}
    method = methods.make_methods(live)[name]
    method.update(*methods.coefficients(4))
    assert all((p != 0).double().mean() > 0.9 for p in live.values())
    before = {key: p.clone() for key, p in live.items()}
    method.member()
    for key, p in live.items():
        moved = (p - before[key]).float().abs().max()
        if name in OURS:  # the next member's weights: nothing has to be undone
            assert methods.SIGMA < moved < 8 * methods.SIGMA
        else:  # undone, up to bf16
            assert moved < 0.1 * methods.SIGMA


@pytest.fixture
def run(monkeypatch, tmp_path, little_garbage):
    """Runs main() on a tiny model; returns a function that does and reads the file."""
    monkeypatch.setitem(shapes.MODELS, "tiny", shapes.Shape("qwen2", 64, 2, 96, 4, 2, 128, True))
    monkeypatch.setitem(generation.MODELS, "cpu", ["tiny"])
    short = [
        generation.Workload("one token", 4, 8, 1),
        generation.Workload("given", 4, 9, 0),
        generation.Workload("a MeZO step", 4, 9, 0, 2, 1),
        generation.Workload("large", 4, 8, 1, 64, 64),
        generation.Workload("long", 4, 8, 9),
    ]
    monkeypatch.setattr(generation, "WORKLOADS", short)
    monkeypatch.setattr(generation_cost, "LENGTHS", (1, 3, 5))
    for module in (generation_cost, generation):
        monkeypatch.setattr(module, "LONG", 8)
    monkeypatch.setitem(generation_cost.ROWS, "cpu", 2)
    monkeypatch.setitem(generation_cost.LIMIT, "cpu", 0.5)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two wait for each other in every operation of so small a model

    def run_and_read(*arguments):
        monkeypatch.setattr(sys, "argv", ["generation.py", "--device", "cpu", "--out", str(tmp_path), *arguments])
        generation.main()
        return json.loads((tmp_path / "generation-cpu.json").read_text())

    yield run_and_read
    torch.set_num_threads(threads)


def test_a_run_writes_whole_rows(run):
    report = run()
    expected = {(w.name, method) for w in generation.WORKLOADS for method in (*generation.THEIRS, *OURS)} | {
        ("a MeZO step", "MeZO")
    }
    assert {(r["workload"], r["way"]) for r in report["generations"]} == expected and len(report["generations"]) == len(
        expected
    )
    for row in report["generations"]:
        assert row["total"] == pytest.approx(row["weights"] + row["answers"] + row["rewards"] + row["update"])
        assert row["answers_measured"] and row["update_measured"] and "answers_from" not in row
        assert row["in_turn"]
        same = [r["answers"] for r in report["generations"] if r["workload"] == row["workload"]]
        assert same == [row["answers"]] * len(same)  # one measurement for every method
    assert all(row["times_reference"] == 1 for row in report["generations"] if row["way"] == generation.REFERENCE)
    assert {row["way"] for row in report["break_even"]} == {*generation.THEIRS, *OURS}
    assert not report["left_out"] and not report["errors"]
    assert {row["model"] for row in report["memory"]} == set(shapes.MODELS)


def test_a_folders_weights_are_those_measured(run, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    trained = AutoModelForCausalLM.from_config(shapes.config("tiny"))
    trained.save_pretrained(tmp_path / "trained")
    loaded = generation_cost.load("tiny", "cpu", tmp_path / "trained")
    assert all(map(torch.equal, loaded.parameters(), trained.parameters()))
    with pytest.raises(SystemExit, match="trained does not hold a model of 50M's shapes"):
        generation_cost.load("50M", "cpu", tmp_path / "trained")
    with pytest.raises(SystemExit):
        run("--weights", str(tmp_path / "trained"))
    assert "name its shapes by --models" in capsys.readouterr().err


def test_what_there_is_no_time_for_is_extrapolated_and_says_so(run, monkeypatch):
    monkeypatch.setattr(generation_cost.AnswerTimer, "_time_for", lambda self, seconds: False)
    monkeypatch.setitem(generation_cost.LIMIT, "cpu", 0)
    rows = {r["workload"]: r for r in run()["generations"] if r["way"] == generation.REFERENCE}
    assert not rows["long"]["answers_measured"]
    source = rows["long"]["answers_from"]
    points = {int(n): seconds for n, seconds in source["seconds_of_a_batch"].items()}
    assert source["batches"] == 2 and source["rows"] == 2 and sorted(points) == [1, 3]
    assert rows["long"]["answers"] == pytest.approx(30 * 2 * generation_cost.extrapolated(points, 9))
    assert not rows["large"]["update_measured"]
    one, thirty = rows["a MeZO step"]["update"], rows["one token"]["update"]
    assert rows["large"]["update"] == pytest.approx(one + 63 * (thirty - one) / 29)
    assert rows["one token"]["answers_measured"] and rows["one token"]["update_measured"]


def test_what_fails_is_an_error_row_and_costs_its_own_workload(run, monkeypatch):
    def fail(*arguments):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(generation_cost, "log_probability", fail)
    report = run()
    assert [(row["workload"], row["error"]) for row in report["errors"]] == [
        (name, "out of memory: CUDA out of memory. Tried to allocate 1 GiB") for name in ("given", "a MeZO step")
    ]
    assert {row["workload"] for row in report["generations"]} == {"one token", "large", "long"}


def test_answers_of_another_length_are_an_error(run, monkeypatch):
    right = generation_cost.HFEngine._in_batches

    def shorter(self, batches, *sampling):
        return [[ids[:-1] for ids in of_member] for of_member in right(self, batches, *sampling)]

    monkeypatch.setattr(generation_cost.HFEngine, "_in_batches", shorter)
    report = run()
    assert {row["workload"] for row in report["errors"]} == {"one token", "large", "long"}


def test_the_faster_decoding_is_kept():
    def rows(decoding, seconds, measured=True):
        about = {
            "model": "m",
            "workload": "w",
            "decoding": decoding,
            "answers_measured": measured,
            "update_measured": True,
        }
        return [
            about | {"way": method, "answers": seconds, "total": seconds, "share_of_weights": 0.0}
            for method in (*generation.THEIRS, *OURS)
        ]

    for first, second, kept in (
        (rows("dynamic", 5.0), rows("static", 3.0), "static"),
        (rows("dynamic", 5.0), rows("static", 7.0), "dynamic"),
        (rows("dynamic", 5.0), rows("static", 3.0, measured=False), "dynamic"),
    ):
        report = {"generations": [], "decodings": []}
        generation._keep_faster(report, first)
        generation._keep_faster(report, second)
        assert [row["decoding"] for row in report["decodings"]] == [first[0]["decoding"], second[0]["decoding"]]
        assert {row["decoding"] for row in report["generations"]} == {kept} and len(report["generations"]) == 5


@pytest.mark.parametrize("decoding", generation.DECODINGS)
def test_every_decoding_answers_with_as_many_tokens_as_are_asked(decoding):
    work = generation_cost.Workload("any", 5, 7, 12)
    timer = generation_cost.AnswerTimer(generation_cost.load("embedded", "cpu"), "cpu", decoding, 0)
    timer.run(work)()
    timer.run(work, 3)()  # it raises if a row has another length


def test_both_decodings_stand_in_the_table():
    rows = [
        {"model": "m", "workload": "w", "decoding": d, "answers": a, "answers_measured": d == "static"}
        for d, a in (("dynamic", 5.0), ("static", 3.0))
    ]
    assert "| m | w | ~5 | 3 |" in tables.decodings({"decodings": rows})
    assert tables.decodings({"decodings": rows[:1]}) == ""  # nothing to compare


def test_without_time_what_is_left_out_is_named(run, capsys):
    report = run("--seconds", "0")
    assert "left out: tiny: long" in capsys.readouterr().err and not report["generations"]
