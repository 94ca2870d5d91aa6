"""Contract: bench/kernels.py writes whole rows, keeps what it has when its time is over, and gives no row to a kernel with wrong bits;
bench/timing.py interleaves, and its percentiles are those of the samples."""

import json
import pathlib
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "bench"))
import kernels
import machine
import operations
import rivals
import shapes
import timing

from es_kernels import backends

pytestmark = pytest.mark.skipif(backends.unavailable("cpu", torch.device("cpu")) is not None, reason="the CPU library was not built")

TINY = shapes.Shape("qwen2", 64, 2, 96, 4, 2, 128, True)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """main() on tensors of a few thousand elements; returns a function that runs it and reads the file."""
    monkeypatch.setattr(kernels, "SIZES", [4096, 1000])
    monkeypatch.setattr(kernels, "MODELS", {"cpu": {"tiny": 2}})
    monkeypatch.setitem(shapes.MODELS, "tiny", TINY)
    monkeypatch.setattr(rivals, "available", lambda device: {"MeZO": rivals.RIVALS["MeZO"]})
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
            r for r in content["calls"] if r["operation"].startswith("copy") and all(r[k] == row[k] for k in ("dtype", "elements", "isa", "threads"))
        )
        assert row["share_of_copy"] == pytest.approx(row["gb_per_s"] / floor["gb_per_s"])
    assert {(row["who"], row["what"]) for row in content["rivals"]} == {
        (who, what) for who in ("es_kernels, base fp32", "es_kernels, base copy", "es_kernels, base None", "MeZO") for what in ("member", "update")
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
    assert "left out: calls of 4096 bf16 (no time)" in capsys.readouterr().err


def test_a_group_that_fails_does_not_cost_the_others(small, monkeypatch, capsys):
    def fails(*arguments):
        raise RuntimeError("CUDA out of memory.\nand much more")

    monkeypatch.setattr(kernels, "measure_calls", fails)
    content = small()
    assert not content["complete"] and content["rivals"] and content["tables"]
    assert "calls of 1000 f16 (CUDA out of memory.)" in capsys.readouterr().err


def test_wrong_bits_get_no_row(small, monkeypatch, tmp_path):
    right = backends._module("cpu").add_noise_

    def wrong(pack, seeds, coefs, *rest):
        right(pack, seeds, coefs + 1e-3 * (seeds.numel() == 8), *rest)

    monkeypatch.setattr(backends._module("cpu"), "add_noise_", wrong)
    with pytest.raises(SystemExit, match="wrong bits.*8 seeds"):
        small()
    labels = {row["operation"] for row in json.loads((tmp_path / "kernels-cpu.json").read_text())["calls"]}
    assert "update bf16 in place, 30 seeds" in labels and "update bf16 in place, 8 seeds" not in labels


def test_the_gate_looks_at_the_end_of_a_large_tensor(monkeypatch):
    """A kernel that stops short of the last values, as one with a 32-bit index does, is caught on the tensor that is timed."""
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
        (operations.Operation("perturb", "bf16", "f32", 1, True), "perturb bf16 <- f32 stochastic", "perturb stochastic bf16 <- f32", 6),
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
    sensors = machine.Sensors("cuda")
    assert sensors.now() == {"sm_mhz": None, "memory_mhz": None, "watts": None} and sensors.joules() is None
    assert sensors.limits() == {"driver": None, "max_sm_mhz": None, "power_limit_watts": None}


def test_files_are_named_after_the_machine():
    assert machine.slug({"processor": "any"}) == "cpu" and machine.slug({"gpu": "NVIDIA H200"}) == "nvidia-h200"
