"""Contract: on sm_90 a value costs at most the instructions that the design allows, kernels spill nothing on any
architecture, and whole blocks are loaded and stored by 128-bit instructions; the library holds code for every GPU that
it claims to serve. Counted from the built library (and, for Triton, an offline compilation)."""

import json
import re
import subprocess
import sys

import pytest

from bench import ROOT
from bench.common import gpus, shapes
from bench.instructions import sass, static_analysis
from es_kernels import native

try:
    sass.tool("cuobjdump")
except SystemExit as why:
    pytest.skip(str(why), allow_module_level=True)

WIDE = {"f32": 2, "bf16": 1, "f16": 1}  # 128-bit accesses of a block


@pytest.fixture(scope="module", params=["sm_80", "sm_90", "sm_100", "sm_120"])
def cuda_rows(request):
    if native.why_not("cuda"):
        pytest.skip(native.why_not("cuda"))
    return static_analysis.cuda_kernels(request.param)


def test_every_kernel_is_found(cuda_rows):
    dtypes = ("f32", "bf16", "f16")
    expected = {f"perturb{s} {out} <- {base}" for s in ("", " stochastic") for out in dtypes for base in dtypes}
    models = ("restore", "swap", "perturb rows", "perturb stochastic rows", "restore rows", "swap rows")
    expected |= {f"{what} {out} <- {base}" for what in models for out in dtypes for base in {out, "f32"}}
    expected |= {f"fingerprint{rows} {dtype}" for rows in ("", " rows") for dtype in ("f32", "bf16")}
    expected |= {f"perturb{s} rank 1 {o} <- {b}" for s in ("", " stochastic") for o in dtypes for b in {o, "f32"}}
    expected |= {f"update{s}{rank}" for s in ("", " stochastic") for rank in ("", " rank 1")}
    assert {r["kernel"] for r in cuda_rows} == expected


def test_cuda_keeps_to_its_budget(cuda_rows):
    assert static_analysis.over_budget(cuda_rows) == []


def test_every_instruction_has_a_pipe(cuda_rows):
    for row in cuda_rows:
        assert "other" not in row["per_value"], row
        assert sum(row["per_value"].values()) == pytest.approx(row["instructions_per_value"], abs=0.02)


def test_cuda_accesses_are_128_bit(cuda_rows):
    for row in cuda_rows:
        if row["kernel"].startswith("fingerprint"):
            assert row["accesses"] == {"LDG.E.128": row["values"] // 8 * WIDE[row["kernel"].split()[-1]]}, row
        elif not row["kernel"].startswith("update"):
            out, base = row["kernel"].split()[-3::2]
            blocks = row["values"] // 8
            if "rank" in row["kernel"]:  # which reads what it needs of the segment too
                row["accesses"] = {name: n for name, n in row["accesses"].items() if ".128" in name}
            assert row["accesses"] == {"LDG.E.128": blocks * WIDE[base], "STG.E.128": blocks * WIDE[out]}, row


def test_every_gpu_from_the_least_capability_on_finds_code():
    """PTX of the oldest architecture, so that none is without; of the newest for what comes after it."""
    if native.why_not("cuda"):
        pytest.skip(native.why_not("cuda"))
    command = [sass.tool("cuobjdump"), "--list-elf", "--list-ptx", native.path("cuda")]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    machine_code, ptx = (
        sorted({int(a) for a in re.findall(rf"sm_(\d+)\w*\.{kind}", listing)}) for kind in ("cubin", "ptx")
    )
    assert native.load("cuda").es_cuda_capability() == machine_code[0] and ptx == [machine_code[0], machine_code[-1]]


def test_triton_keeps_to_its_budget():
    pytest.importorskip("triton")
    # A process of its own: in this one Triton's kernels may be interpreted. It needs neither nvcc nor the library.
    count = "import json; from bench.instructions import triton_sass; print(json.dumps(triton_sass.rows('sm_90')))"
    counted = subprocess.run(
        [sys.executable, "-c", count], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    rows = json.loads(counted)
    assert {r["kernel"] for r in rows} >= {"triton perturb bf16 <- bf16", "triton perturb bf16 <- f32", "triton update"}
    assert static_analysis.over_budget(rows) == []
    for row in rows:
        if row["kernel"].startswith("triton update"):
            continue
        # At low rank beside weights a tile's segment is read, by words.
        of_weights = [a for a in row["accesses"] if "rank" not in row["kernel"] or a.startswith("STG") or ".128" in a]
        assert {access.split(".")[0] for access in of_weights} == {"LDG", "STG"}, row
        assert all(".128" in access for access in of_weights), row


COUNTED = {
    "arch": "sm_90",
    "kernel": "perturb bf16 <- f32",
    "instructions_per_value": 32.0,
    "per_value": {"FMA": 8.0, "IMAD.WIDE": 4.0, "ALU": 12.0, "LSU": 0.5},
}


def test_a_prediction_by_hand():
    # H200: 6 B at 0.9 * 4800 GB/s are 1.389 ps; 132 SMs at 1.98 GHz do 261.36 G cycles/s: 32 / 128 of one 0.957 ps, 12
    # / 64 of one 0.717 ps.
    prediction = gpus.predict(COUNTED, "H200 SXM")
    assert prediction["binds"] == "memory" and prediction["share_of_copy"] == 1
    assert prediction["busy"]["issue"] == pytest.approx(0.957 / 1.389, abs=1e-3) and prediction["busy"][
        "ALU"
    ] == pytest.approx(0.717 / 1.389, abs=1e-3)
    # Integer multiply-adds share the pipe
    assert prediction["busy"]["FMA"] == pytest.approx((8 + 4) / 128 / 0.26136 / 1.389, abs=1e-3)
    # Twice the instructions: 1.913 ps of issue slots, so 1.389 / 1.913 of a copy.
    prediction = gpus.predict(COUNTED | {"instructions_per_value": 64.0}, "H200 SXM")
    assert prediction["binds"] == "issue" and prediction["share_of_copy"] == pytest.approx(1.389 / 1.913, abs=1e-3)
    # An update moves nothing: 261.36e9 * 128 / 32 normals a second.
    assert gpus.predict(COUNTED | {"kernel": "update"}, "H200 SXM")["normals_per_s"] == pytest.approx(
        1.045e12, rel=1e-2
    )


def test_a_decoding_step_by_hand(monkeypatch):
    # One layer, one KV head of 4: q, o 8 x 8, k, v 4 x 8, three of 16 x 8, a tied head of 32 x 8.
    monkeypatch.setitem(shapes.MODELS, "tiny", shapes.Shape("llama", 8, 1, 16, 2, 1, 32, True))
    weights = 2 * 64 + 2 * 32 + 3 * 128 + 256
    bandwidth, rate = 0.9 * 4800e9, 989e12
    # 6 rows after 10 tokens, each of one key and one value of 4 in 2 bytes; reading takes longer than computing.
    step = gpus.decoding_step("tiny", "H200 SXM", 3, 2, 10)
    plain = (2 * weights + 6 * 10 * 2 * 4 * 2) / bandwidth
    assert plain > 2 * weights * 6 / rate and step["plain"] == pytest.approx(plain)
    assert step["one by one"] == pytest.approx(3 * (2 * weights + 2 * 10 * 2 * 4 * 2) / bandwidth)
    outputs, inputs = 8 + 8 + 4 + 4 + 16 + 16 + 8 + 32, 7 * 8 + 16
    terms = 2 * (3 * (outputs + inputs) + 6 * (inputs + 2 * outputs))
    assert step["one batch"] == pytest.approx(plain + terms / bandwidth)
    # 10^5 rows compute
    assert gpus.decoding_step("tiny", "H200 SXM", 1, 10**5, 0)["plain"] == pytest.approx(2 * weights * 1e5 / rate)


def test_what_was_measured_stands_beside_what_was_predicted(tmp_path):
    calls = [
        {"backend": "cuda", "kernel": "perturb bf16 <- f32", "elements": n, "share_of_copy": n / 1000}
        for n in (100, 900, 500)
    ]
    calls.append({"backend": "triton", "kernel": "perturb bf16 <- f32", "elements": 2000, "share_of_copy": 0.5})
    (tmp_path / "kernels-nvidia-h200.json").write_text(json.dumps({"machine": {"gpu": "NVIDIA H200"}, "calls": calls}))
    (tmp_path / "kernels-cpu.json").write_text(
        json.dumps({"machine": {"processor": "any"}, "calls": [{"backend": "cpu", "kernel": "perturb bf16 <- f32"}]})
    )
    by_gpu = {row["gpu"]: row for row in gpus.predictions([COUNTED], tmp_path)}
    assert by_gpu["H200 SXM"]["measured"] == {"share_of_copy": 0.9, "elements": 900}
    assert "measured" not in by_gpu["H100 SXM"]
    assert set(by_gpu) == {"H100 SXM", "H200 SXM"}
