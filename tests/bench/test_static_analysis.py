"""Contract: on sm_90 a value costs at most the instructions that the design allows, kernels spill nothing on any architecture, and
whole blocks are loaded and stored by 128-bit instructions. Counted from the built library (and, for Triton, an offline compilation)."""

import json
import pathlib
import subprocess
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "bench"))
import sass
import static_analysis

from es_kernels import native

try:
    sass.tool("cuobjdump")
except SystemExit as why:
    pytest.skip(str(why), allow_module_level=True)

WIDE = {"f32": 4, "bf16": 2, "f16": 2}  # 128-bit accesses of two blocks


@pytest.fixture(scope="module", params=["sm_80", "sm_90", "sm_100", "sm_120"])
def cuda_rows(request):
    if native.why_not("cuda"):
        pytest.skip(native.why_not("cuda"))
    return static_analysis.cuda_kernels(request.param)


def test_every_kernel_is_found(cuda_rows):
    dtypes = ("f32", "bf16", "f16")
    expected = {f"perturb{s} {out} <- {base}" for s in ("", " stochastic") for out in dtypes for base in dtypes}
    assert {r["kernel"] for r in cuda_rows} == expected | {"update", "update stochastic"}


def test_cuda_keeps_to_its_budget(cuda_rows):
    assert static_analysis.over_budget(cuda_rows) == []


def test_cuda_accesses_are_128_bit(cuda_rows):
    for row in cuda_rows:
        if row["kernel"].startswith("perturb"):
            out, base = row["kernel"].split()[-3::2]
            assert row["accesses"] == {"LDG.E.128": WIDE[base], "STG.E.128": WIDE[out]}, row


def test_triton_keeps_to_its_budget(tmp_path):
    pytest.importorskip("triton")
    # A process of its own: in this one Triton's kernels may be interpreted.
    script = pathlib.Path(static_analysis.__file__)
    subprocess.run([sys.executable, script, "--archs", "90", "--json", tmp_path / "rows.json"], check=True, capture_output=True)
    rows = [r for r in json.loads((tmp_path / "rows.json").read_text())["rows"] if r["kernel"].startswith("triton")]
    assert {r["kernel"] for r in rows} >= {"triton perturb bf16 <- bf16", "triton perturb bf16 <- f32", "triton update"}
    assert static_analysis.over_budget(rows) == []
    for row in rows:
        assert all(".128" in access for access in row["accesses"]) or row["kernel"] == "triton update", row
