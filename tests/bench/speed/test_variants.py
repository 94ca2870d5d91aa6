"""Contract: every variant of the kernels can be made from the sources as they are; its bits are compared with what
ships before it is timed, on the same tensors; a floor is timed though its bits differ."""

import contextlib
import shutil

import pytest

from bench.common import operations
from bench.instructions import sass
from bench.speed import tune, variants
from es_kernels import native
from es_kernels.backends import cpu, cuda, triton


@pytest.mark.parametrize("name", variants.CUDA)
def test_a_variant_changes_the_sources_in_its_places(name, tmp_path):
    variants.sources(name, tmp_path / "csrc")
    differing = {
        p.name for p in (tmp_path / "csrc").iterdir() if p.read_text() != (variants.ROOT / "csrc" / p.name).read_text()
    }
    assert differing == {file for file, *_ in variants.CUDA[name].edits}


def test_variants_apply_together_or_say_why_not(tmp_path):
    variants.sources("evict-first stores + a tile of 2048 units", tmp_path / "both")
    text = (tmp_path / "both/cuda.cu").read_text()
    assert "st.global.cs.v4" in text and "kLargestTile = 2048" in text
    with pytest.raises(ValueError, match="stands 0 times in cuda.cu"):
        variants.sources("a tile of 2048 units + a tile of 32768 units", tmp_path / "clash")
    with pytest.raises(SystemExit, match="there is no variant 'a tile of wood'"):
        variants.sources("a tile of wood", tmp_path / "unknown")


def test_constants_of_triton_exist():
    assert all(hasattr(triton, key) for key in tune._KEYS)
    assert {key for v in variants.TRITON.values() for key in v.constants} <= {*tune._KEYS, "maxnreg"}


def test_another_build_and_other_constants_are_in_force_inside_only():
    before = cuda._library, triton._UNITS, triton._WARPS, dict(triton._OPTIONS)
    with tune.using("another"), tune.using(constants={"_UNITS": 512, "_WARPS": 8, "maxnreg": 64}):
        assert cuda._library() == "another" and triton._UNITS == 512
        assert triton._OPTIONS == before[3] | {"num_warps": 8, "maxnreg": 64}
    assert (cuda._library, triton._UNITS, triton._WARPS, triton._OPTIONS) == before


@pytest.fixture
def settings(monkeypatch):
    """using() for the cpu backend: builds named "wrong" compute with other coefficients."""
    if native.why_not("cpu"):
        pytest.skip(native.why_not("cpu"))
    honest = cpu.add_noise_

    @contextlib.contextmanager
    def using(library):
        with pytest.MonkeyPatch.context() as patch:
            if library == "wrong":
                patch.setattr(
                    cpu, "add_noise_", lambda pack, seeds, coefs, *rest: honest(pack, seeds, 1.5 * coefs, *rest)
                )
            if library == "fails":
                patch.setattr(
                    cpu, "add_noise_", lambda *arguments: native.check(1, lambda: b"too many resources\nrequested")
                )
            yield

    monkeypatch.setattr(tune, "using", using)
    return {name: {"library": name} for name in (tune.SHIPPED, "same", "wrong", "floor", "fails", "elsewhere")} | {
        "floor": {"library": "wrong"}
    }


def test_only_what_has_the_bits_of_what_ships_is_timed(settings, monkeypatch):
    monkeypatch.setattr(
        tune,
        "OPERATIONS",
        {
            operations.Operation("perturb", "bf16", "f32"): variants.PERTURB,
            operations.Operation("fingerprint", "f32"): variants.FINGERPRINT,
        },
    )
    touches = lambda name: () if name == "elsewhere" else variants.EVERY  # noqa: E731
    rows = list(
        tune.measure("cpu", settings, lambda name: name != "floor", touches, tune.Tensors(8192, "cpu"), rounds=2)
    )
    assert all(row["variant"] in tune._line(row) for row in rows)
    perturb = {row["variant"]: row for row in rows if row["operation"].startswith("perturb")}
    assert set(perturb) == {"wrong", "fails", tune.SHIPPED, "same", "floor"}
    assert perturb["wrong"]["error"] == "wrong bits" and "seconds" not in perturb["wrong"]
    assert perturb["fails"]["error"] == "too many resources"
    assert perturb[tune.SHIPPED]["times_shipped"] == 1 and perturb["same"]["share_of_copy"] > 0
    assert {row["variant"] for row in rows if row["operation"].startswith("fingerprint")} == set(settings) - {
        "elsewhere"
    }


def test_without_what_ships_nothing_is_timed(settings, monkeypatch):
    monkeypatch.setattr(tune, "OPERATIONS", {operations.Operation("perturb", "bf16"): variants.PERTURB})
    settings = {tune.SHIPPED: {"library": "fails"}, "same": {"library": "same"}}
    rows = list(
        tune.measure(
            "cpu", settings, lambda name: True, lambda name: variants.EVERY, tune.Tensors(8192, "cpu"), rounds=2
        )
    )
    assert [row["variant"] for row in rows] == [tune.SHIPPED, "same"] and all("error" in row for row in rows)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_the_floor_reads_and_writes_what_ships_does(tmp_path):
    try:
        sass.tool("cuobjdump")
    except SystemExit as why:
        pytest.skip(str(why))
    library = variants.build("no noise + no keys", tmp_path, "90", tune.nvcc_flags())
    # Without noise there are no conversions to count values by, but each access is still 128 bits wide, and nothing is
    # left of the generator.
    for name, code in sass.functions(library, "sm_90").items():
        for trip in sass.loops(code):
            wide = [i.text for i in trip if ".128" in i.text and i.text.startswith(("LDG", "STG"))]
            if "perturb" in name and len(wide) >= 4 and not any(i.text.startswith("LDG.E.64") for i in trip):
                assert sum(t.startswith("LDG") for t in wide) and sum(t.startswith("STG") for t in wide)
                assert sass.by_pipe(trip).get("IMAD.WIDE", 0) <= (72 if "true" in name else 4)
