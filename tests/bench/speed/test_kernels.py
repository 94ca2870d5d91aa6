"""Contract: bench/speed/kernels.py writes whole rows, keeps what it has when its time is over, and gives no row to
a kernel with wrong bits; bench/common/timing.py interleaves, and its percentiles are those of the samples."""

import contextlib
import json
import re
import sys

import pytest
import torch

from bench.common import baselines, environment, methods, operations, shapes, timing
from bench.publish import tables, targets
from bench.speed import kernels
from es_kernels import backends

pytestmark = [
    pytest.mark.skipif(
        backends.unavailable("cpu", torch.device("cpu")) is not None, reason="the CPU library was not built"
    ),
    pytest.mark.usefixtures("little_garbage"),
]

TINY = shapes.Shape("qwen2", 64, 2, 96, 4, 2, 128, True)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """main() on tensors of a few thousand elements; returns a function that runs it and reads the file."""
    monkeypatch.setattr(kernels, "SIZES", [4096, 1000])
    monkeypatch.setattr(kernels, "MODELS", {"cpu": {"tiny": 2}})
    monkeypatch.setitem(shapes.MODELS, "tiny", TINY)
    monkeypatch.setattr(baselines, "available", lambda device: {"MeZO": baselines.BASELINES["MeZO"]})
    threads = torch.get_num_threads()
    monkeypatch.setenv("ES_KERNELS_ISA", "baseline")  # main() sets it: restored afterwards

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["kernels.py", "--device", "cpu", "--out", str(tmp_path), *arguments])
        try:
            kernels.main()
        finally:
            torch.set_num_threads(threads)
            content = json.loads((tmp_path / "kernels-cpu.json").read_text())
        return content

    return run


def test_rows_are_whole(small):
    content = small()
    assert content["complete"] and content["machine"]["processor"] and "commit" in content["machine"]
    calls = [row for row in content["calls"] if row["backend"] == "cpu"]
    for size in (4096, 1000):
        for dtype in operations.DTYPES:
            labels = {row["operation"] for row in calls if row["elements"] == size and row["dtype"] == dtype}
            assert labels == {o.label for o in operations.operations(dtype)}
    for row in content["calls"]:
        assert row["p20"] <= row["seconds"] <= row["p80"]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["seconds"] / 1e9)
        floor = next(
            r
            for r in content["calls"]
            if r["operation"].startswith("copy")
            and all(r[k] == row[k] for k in ("dtype", "elements", "isa", "threads"))
        )
        assert row["share_of_copy"] == pytest.approx(row["gb_per_s"] / floor["gb_per_s"])
    assert {(row["who"], row["what"]) for row in content["rivals"]} == {
        (who, what)
        for who in ("es_kernels, master fp32", "es_kernels, master copy", "es_kernels, master None", "MeZO")
        for what in ("member", "update")
    }
    assert all(row["times_ours"] > 0 and row["peak_extra_bytes"] >= 0 for row in content["rivals"])
    assert {row["operation"] for row in content["tables"]} == {
        "perturb bf16 in place",
        "perturb bf16 <- f32",
        "swap bf16 in place",
        "restore bf16 <- f32",
        "fingerprint bf16",
        "update f32 in place, 30 seeds",
    }


def test_out_of_time_keeps_what_there_is(small, capsys):
    content = small("--seconds", "0")
    assert not content["complete"] and not content["calls"]
    assert {"kind": "calls", "dtype": "bf16", "elements": 4096, "why": "no time"} in content["left_out"]
    assert {"kind": "rivals", "model": "tiny", "why": "no time"} in content["left_out"]
    assert "left out: calls bf16, 4096: no time" in capsys.readouterr().err


def test_a_group_that_fails_does_not_cost_the_others(small, monkeypatch, capsys):
    def fails(*arguments):
        raise RuntimeError("CUDA out of memory.\nand much more")

    monkeypatch.setattr(kernels, "measure_calls", fails)
    content = small()
    assert not content["complete"] and content["rivals"] and content["tables"]
    assert "left out: calls f16, 1000: CUDA out of memory." in capsys.readouterr().err


def test_a_run_that_dies_keeps_every_row_before(small, monkeypatch, tmp_path):
    """As when it is cut off in the middle of a group, of whose rows one is there."""
    peaks = iter([0])
    monkeypatch.setattr(timing, "peak_extra_bytes", lambda run, device: next(peaks))
    report = kernels.Report("cpu", tmp_path, 60)
    with pytest.raises(StopIteration):
        kernels.measure_baselines(report, [kernels.Place("cpu", "baseline", 1)], "tiny", 2)
    kept = json.loads((tmp_path / "kernels-cpu.json").read_text())
    assert len(kept["rivals"]) == 1 and not kept["complete"]


def test_a_run_on_a_gpu(played_gpu, monkeypatch, tmp_path):
    """Every step of it but the kernels: captured calls and tables, eager baselines that are queued or wait, the targets
    and tables made of them."""
    monkeypatch.setattr(kernels, "SIZES", [4096])
    monkeypatch.setattr(kernels, "MODELS", {"cuda": {"Qwen2.5-7B": 30}})
    monkeypatch.setitem(shapes.MODELS, "Qwen2.5-7B", TINY)
    monkeypatch.setattr(kernels.Report, "passes", lambda self, *which: True)

    def waits(*arguments):
        played_gpu.launch(1e-3)
        played_gpu.synchronize()
        played_gpu.launch(1e-3)

    monkeypatch.setattr(
        baselines,
        "available",
        lambda device: {
            "es-at-scale": baselines.Baseline(waits, lambda *a: None, waits, baselines.Bytes(), baselines.Bytes())
        },
    )
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--device", "cuda", "--out", str(tmp_path)])
    kernels.main()
    content = json.loads((tmp_path / "kernels-nvidia-h200.json").read_text())
    assert content["complete"] and content["left_out"] == [] and content["machine"]["capability"] == "sm_90"
    assert {row["backend"] for kind in ("calls", "tables") for row in content[kind]} == {"cuda", "triton", "torch"}
    assert all(row["queued"] and "host_seconds" not in row for kind in ("calls", "tables") for row in content[kind])
    of_members = {row["who"]: row for row in content["rivals"] if row["what"] == "member"}
    default = of_members["es_kernels, master fp32"]
    assert (
        default["queued"]
        and default["seconds"] == pytest.approx(10e-6, rel=0.1)
        and default["host_seconds"] == pytest.approx(20e-6)
    )
    assert not of_members["es-at-scale"]["queued"] and of_members["es-at-scale"]["times_ours"] > 190
    assert re.search(
        r"\| es-at-scale \| 0.00\d+ \(waits\) \|", tables.of_machine(tmp_path / "kernels-nvidia-h200.json")
    )
    reached = {what for what, _, value, _ in targets.rows(targets.reports(tmp_path)["NVIDIA H200"]) if value}
    assert {
        "es-at-scale over ours, a member of Qwen2.5-7B, master fp32",
        "one launch for Qwen2.5-7B: times a flat tensor, the slowest operation",
    } <= reached


# ---- memory: what a card can hold is measured on it ----

CARDS = {"H100": 84.3e9, "H200": 149.4e9, "24 GB": 24e9}  # free bytes of 79.1 GiB, of 139.8 GiB, less a CUDA context
OURS = ("es_kernels, master fp32", "es_kernels, master copy", "es_kernels, master None")


@pytest.fixture
def measured_on(monkeypatch, tmp_path):
    """measured_on(card): ({(kind, who, what)} of the rows that Qwen2.5-7B gets there, what is left out). Nothing is
    made or timed: what is free goes down by weights and masters as soon as these are there."""
    all_methods = {name: methods.Method(print, print) for name in OURS}
    all_methods |= {
        name: methods.Method(print, print, baseline.member_bytes, baseline.update_bytes, baseline.empties_cache)
        for name, baseline in baselines.BASELINES.items()
    }

    def measured(card):
        monkeypatch.setattr(kernels, "_free_bytes", lambda device: CARDS[card])
        report = kernels.Report("cpu", tmp_path, 60)
        report.device, rows = "cuda", set()
        report.add = lambda kind, row: rows.add((kind, row.get("who"), row.get("what")))
        report.passes = lambda *operation: True

        def with_bases(live):
            monkeypatch.setattr(
                kernels, "_free_bytes", lambda device: CARDS[card] - methods.HELD(kernels._sizes("Qwen2.5-7B"))
            )
            return all_methods

        def timed(variants, device, rounds):
            return dict.fromkeys(variants, timing.Timing(1.0, 1.0, 1.0, rounds))

        def made(*arguments):
            rows.add(("tables", None, None))
            raise InterruptedError

        for name, stands_for in {
            "make_methods": with_bases,
            "interleave": timed,
            "_weights": lambda *arguments: {},
            "_table_and_flat": made,
        }.items():
            monkeypatch.setattr(kernels, name, stands_for)
        monkeypatch.setattr(timing, "peak_extra_bytes", lambda run, device: 0)
        group = [kernels.Place("cuda")]
        with contextlib.suppress(InterruptedError):
            kernels.measure_table(report, group, "Qwen2.5-7B")
        kernels.measure_baselines(report, group, "Qwen2.5-7B", 30)
        return rows, report.content["left_out"]

    return measured


def test_every_row_of_a_7b_model_is_measured_on_an_h200(measured_on):
    rows, left_out = measured_on("H200")
    assert left_out == []
    assert rows == {("rivals", who, what) for who in (*OURS, *baselines.BASELINES) for what in ("member", "update")} | {
        ("tables", None, None)
    }


def test_an_h100_leaves_out_only_what_holds_a_sum_of_the_whole_model(measured_on):
    """Weights and bases are 61 GB; sums in float32 are 30, noise is 15."""
    rows, left_out = measured_on("H100")
    assert [(entry["who"], entry["what"], entry["why"]) for entry in left_out] == [
        ("torch._foreach", "update", "needs 45.7 GB, 22.2 GB can be had"),
        ("torch.compile", "update", "needs 30.5 GB, 22.2 GB can be had"),
    ]
    assert len(rows) == 2 * len(OURS) + 2 * len(baselines.BASELINES) - 2 + 1


def test_a_small_card_says_what_it_would_take(measured_on):
    rows, left_out = measured_on("24 GB")
    assert rows == set() and [(entry["kind"], entry["model"], entry["why"]) for entry in left_out] == [
        ("tables", "Qwen2.5-7B", "needs 45.7 GB, 22.8 GB can be had"),
        ("rivals", "Qwen2.5-7B", "needs 60.9 GB, 22.8 GB can be had"),
    ]


def test_a_models_table_and_its_flat_twin_are_one_memory():
    table, flat = kernels._table_and_flat("Qwen2.5-0.5B", torch.bfloat16, "meta")
    assert {name: tuple(t.shape) for name, t in table.items()} == shapes.parameter_shapes("Qwen2.5-0.5B")
    ends = 0
    for t in table.values():
        assert t.storage_offset() >= ends and t.storage_offset() * 2 % 512 == 0
        ends = t.storage_offset() + t.numel()
    assert flat["whole"].numel() == sum(t.numel() for t in table.values())
    assert flat["whole"].untyped_storage()._cdata == table["model.embed_tokens.weight"].untyped_storage()._cdata


def test_wrong_bits_get_no_row(small, monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "SIZES", [1000])
    right = backends._module("cpu").add_noise_

    def wrong(pack, seeds, coefs, *rest):
        right(pack, seeds, coefs + 1e-3 * (seeds.numel() == 8), *rest)

    monkeypatch.setattr(backends._module("cpu"), "add_noise_", wrong)
    with pytest.raises(SystemExit, match="wrong bits.*8 seeds"):
        small()
    labels = {row["operation"] for row in json.loads((tmp_path / "kernels-cpu.json").read_text())["calls"]}
    assert "update bf16 in place, 30 seeds" in labels and "update bf16 in place, 8 seeds" not in labels


def test_the_gate_looks_at_the_end_of_a_large_tensor(monkeypatch):
    """A kernel that stops short of the last values, as one with a 32-bit index does, is caught on the tensor that is
    timed."""
    operation, module = operations.Operation("perturb", "f32"), backends._module("cpu")
    out = torch.zeros(100_000)
    assert operations.right_at_size(operation, out, None, "cpu", "cpu")
    right = module.add_noise_

    def short(pack, *rest):
        kept = out[-5:].clone()
        right(pack, *rest)
        out[-5:] = kept

    monkeypatch.setattr(module, "add_noise_", short)
    assert not operations.right_at_size(operation, out, None, "cpu", "cpu")


@pytest.mark.parametrize(
    "operation, label, kernel, moved",
    [
        (operations.Operation("perturb", "bf16"), "perturb bf16 in place", "perturb bf16 <- bf16", 4),
        (
            operations.Operation("perturb", "bf16", "f32", 1, True),
            "perturb bf16 <- f32 stochastic",
            "perturb stochastic bf16 <- f32",
            6,
        ),
        (operations.Operation("swap", "f16", None, 2), "swap f16 in place", "swap f16 <- f16", 4),
        (operations.Operation("swap", "bf16", None, 2, True), "swap bf16 in place stochastic", "update stochastic", 4),
        (operations.Operation("update", "f32", None, 30), "update f32 in place, 30 seeds", "update", 8),
        (operations.Operation("restore", "bf16", "f32", 0), "restore bf16 <- f32", "restore bf16 <- f32", 6),
        (operations.Operation("fingerprint", "f32"), "fingerprint f32", "fingerprint f32", 4),
    ],
)
def test_what_an_operation_moves(operation, label, kernel, moved):
    assert (operation.label, operation.kernel, operation.bytes_per_value) == (label, kernel, moved)


def test_variants_take_turns_and_buffer_sets_too():
    seen = []
    variants = {name: timing.Variant(lambda k, name=name: seen.append((name, k)), copies=2) for name in "ab"}
    timings = timing.interleave(variants, "cpu", rounds=4)
    turns = seen[4:]  # after the warm-up of every buffer set
    assert [name for name, _ in turns] == ["a", "b"] * 5 and [k for name, k in turns if name == "a"] == [1, 0, 1, 0, 1]
    assert set(timings) == {"a", "b"} and all(t.rounds == 4 for t in timings.values())


def test_percentiles():
    assert timing.percentiles([5.0, 1.0, 4.0, 2.0, 3.0]) == (3.0, 2.0, 4.0)
    assert timing.percentiles([7.0]) == (7.0, 7.0, 7.0)


def test_peak_memory_of_a_temporary():
    weights = torch.ones(1 << 24)
    extra = timing.peak_extra_bytes(lambda: weights.add_(torch.ones(1 << 24)), "cpu")
    assert 0.9 * weights.nbytes < extra < 1.5 * weights.nbytes
    assert timing.peak_extra_bytes(lambda: weights.add_(1), "cpu") < 0.1 * weights.nbytes


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, whose sensors may be read")
def test_what_no_sensor_says_is_unknown():
    sensors = environment.Sensors("cuda")
    assert sensors.now() == {"sm_mhz": None, "memory_mhz": None, "watts": None} and sensors.joules() is None
    assert sensors.limits() == {"driver": None, "max_sm_mhz": None, "power_limit_watts": None}


def test_files_are_named_after_the_machine():
    assert environment.slug({"processor": "any"}) == "cpu" and environment.slug({"gpu": "NVIDIA H200"}) == "nvidia-h200"
