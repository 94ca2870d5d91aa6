"""Contract under test: `python -m es_kernels` reports what is installed and why each backend serves or not, checks
every available one against the golden vectors, and ends with OK or FAILED and the exit code to match; a broken part is
reported, never raised."""

import json
import os
import subprocess
import sys

import pytest

import es_kernels
from es_kernels import __main__ as tool
from es_kernels import backends, native, noise


@pytest.fixture(autouse=True)
def no_interpreted_triton(monkeypatch):
    """In this process Triton may be interpreted, without what makes the interpreter exact; as a command it is not."""
    from es_kernels.backends import triton

    monkeypatch.setattr(triton, "unavailable", lambda device: "it is left out of this test")


@pytest.fixture
def golden():
    return json.loads(tool.GOLDEN.read_text())


@pytest.mark.parametrize("arguments", ([], ["--json"]), ids=("lines", "json"))
def test_as_a_command(arguments):
    env = {k: v for k, v in os.environ.items() if k not in ("ES_KERNELS_BACKEND", "ES_KERNELS_ISA", "TRITON_INTERPRET")}
    result = subprocess.run(
        [sys.executable, "-m", "es_kernels", *arguments], capture_output=True, text=True, timeout=120, env=env
    )
    assert result.returncode == 0, result.stdout + result.stderr
    if arguments:
        r = json.loads(result.stdout)
        assert (
            r["ok"] is True
            and r["versions"]["es_kernels"] == es_kernels.__version__
            and r["versions"]["noise"] == noise.VERSION
        )
        assert set(r["backends"]) == set(backends.NAMES) and r["serves"]["cpu"] in ("cpu", "reference")
        assert any(c["backend"] == "reference" and c["error"] is None for c in r["self_check"])
    else:
        lines = result.stdout.splitlines()
        assert lines[-1] == "OK"
        for word in (
            "es_kernels",
            "noise",
            "python",
            "numpy",
            "torch",
            "triton",
            "cuda driver",
            "instruction sets",
            "threads",
            "serves cpu tensors",
        ):
            assert any(line.startswith(word) for line in lines), word
        assert all(any(f"backend {n}" in line for line in lines) for n in backends.NAMES)


def test_every_available_instruction_set_is_checked(capsys):
    if native.why_not("cpu"):
        pytest.skip(native.why_not("cpu"))
    assert tool.main(["--json"]) == 0
    r = json.loads(capsys.readouterr().out)
    assert [c["isa"] for c in r["self_check"] if c["backend"] == "cpu"] == r["cpu"]["instruction sets"]
    assert "ES_KERNELS_ISA" not in os.environ


@pytest.mark.parametrize("kind", ("add_noise", "normal", "fingerprint"))
def test_one_wrong_bit_in_a_vector_fails(golden, kind, monkeypatch, tmp_path, capsys):
    v = golden[kind][1]
    if kind == "add_noise":
        v["out"][1][-1] = hex(int(v["out"][1][-1], 16) ^ 1)
    elif kind == "normal":
        v["bits"][3] = hex(int(v["bits"][3], 16) ^ 1)
    else:
        v["fingerprint"] = hex(int(v["fingerprint"], 16) ^ 1)
    (tmp_path / "golden.json").write_text(json.dumps(golden))
    monkeypatch.setattr(tool, "GOLDEN", tmp_path / "golden.json")
    assert tool.main([]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "FAILED" and f"{kind} vector 1" in out


def test_a_backend_with_other_bits_fails(golden, monkeypatch):
    """The reference itself is the one that is broken here: a coefficient of the transform is one ulp off."""
    import numpy as np

    tool.self_check(golden, "cpu")
    monkeypatch.setattr(noise, "SIN", (np.nextafter(noise.SIN[0], np.float32(1)), *noise.SIN[1:]))
    with es_kernels.backend("reference"), pytest.raises(RuntimeError, match="vector"):
        tool.self_check(golden, "cpu")


def raises(*args):
    raise OSError("this part\nis broken")


@pytest.mark.parametrize(
    "target, name",
    (
        (tool.importlib.metadata, "version"),
        (tool.platform, "platform"),
        (native, "load"),
        (native, "why_not"),
        (backends, "unavailable"),
        (tool, "self_check"),
    ),
    ids=lambda x: x if isinstance(x, str) else getattr(x, "__name__", ""),
)
def test_broken_parts_are_reported_not_raised(target, name, monkeypatch, capsys):
    monkeypatch.setattr(target, name, raises)
    code = tool.main([])
    out = capsys.readouterr().out
    assert "OSError: this part" in out
    assert (code, out.splitlines()[-1]) in ((0, "OK"), (1, "FAILED"))
    if name in ("self_check", "unavailable"):
        assert code == 1
    if name in ("version", "platform"):
        assert code == 0


def test_missing_golden_file_fails(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tool, "GOLDEN", tmp_path / "none.json")
    assert tool.main([]) == 1 and "FileNotFoundError" in capsys.readouterr().out


@pytest.mark.parametrize("name, words", (("cuda", "cuda backend was asked for, but"), ("cudnn", "no backend 'cudnn'")))
def test_an_override_that_cannot_serve_fails(monkeypatch, capsys, name, words):
    monkeypatch.setenv("ES_KERNELS_BACKEND", name)
    assert tool.main([]) == 1
    out = capsys.readouterr().out
    assert words in out and out.splitlines()[-1] == "FAILED"


def test_an_instruction_set_that_is_not_there_fails(monkeypatch, capsys):
    if native.why_not("cpu"):
        pytest.skip(native.why_not("cpu"))
    monkeypatch.setenv("ES_KERNELS_ISA", "sse9")
    assert tool.main([]) == 1 and "no instruction set named sse9" in capsys.readouterr().out
    assert os.environ["ES_KERNELS_ISA"] == "sse9"


@pytest.mark.filterwarnings("ignore:es_kernels. SLOW")
def test_no_compiled_library_is_no_failure(monkeypatch, capsys):
    """A pure wheel: the reference serves."""
    monkeypatch.setattr(native, "_load", lambda name: (None, f"libes_{name}.so was not built"))
    assert tool.main([]) == 0
    out = capsys.readouterr().out
    assert "libes_cpu.so was not built" in out and "serves cpu tensors         reference (SLOW: " in out
