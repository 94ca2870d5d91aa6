"""Contract: one wheel for every Python: py3-none-linux_x86_64 with the libraries where there are compilers, pure
without one, and then the reference serves, with the same bits. The CPU library needs nothing but libc, and none that is
newer than manylinux_2_28: no Python, torch or C++ runtime. It has the instruction sets that the compiler can do. The
CUDA library is built for what nvcc knows; where it cannot be built, the rest is. `make build` works with any setuptools
since 53."""

import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = """
import json, torch, es_kernels
from es_kernels.backends import cpu
t = torch.zeros(1000, dtype=torch.bfloat16)
es_kernels.add_noise_(t, [1, 2], [1.0, 0.5], name="w")
backend = es_kernels.active_backend()
isas = cpu.isas() if backend == "cpu" else []
print(json.dumps([backend, isas, es_kernels.__file__, es_kernels.fingerprint({"w": t})]))
"""


def wheel(tmp_path, **environment):
    """Builds a wheel from a copy of the sources, as a source distribution would be; returns its path and pip's
    output."""
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for part in ("es_kernels", "csrc", "python", "bench"):
        shutil.copytree(ROOT / part, source / part, ignore=ignore)
    for part in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, source / part)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-v",
        "--no-deps",
        "--wheel-dir",
        str(tmp_path / "dist"),
        str(source),
    ]
    run = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    wheels = list((tmp_path / "dist").glob("*.whl"))
    return (wheels[0] if wheels else None), run.stdout + run.stderr


def installed(built, tmp_path):
    """(backend, instruction sets, fingerprint) in a process that imports es_kernels from the unpacked wheel."""
    site = tmp_path / "site"
    with zipfile.ZipFile(built) as z:
        z.extractall(site)
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    backend, isas, file, fingerprint = json.loads(run.stdout)
    assert pathlib.Path(file).is_relative_to(site)
    return backend, isas, fingerprint


def objdump(option, library):
    return subprocess.run(["objdump", option, library], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def expected():
    import torch

    import es_kernels

    t = torch.zeros(1000, dtype=torch.bfloat16)
    es_kernels.add_noise_(t, [1, 2], [1.0, 0.5], name="w")
    return es_kernels.fingerprint({"w": t})


def test_pure_wheel_without_a_compiler(tmp_path, expected):
    built, output = wheel(tmp_path, CXX="no-such-compiler", ES_KERNELS_CUDA="0")
    assert built and built.name.endswith("-py3-none-any.whl"), output
    names = zipfile.ZipFile(built).namelist()
    assert not [n for n in names if n.endswith(".so") or n.startswith("bench/")]
    assert {
        "es_kernels/NOISE.md",
        "es_kernels/golden.json",
        "es_kernels/py.typed",
        "es_finetune/py.typed",
        "es_finetune/models/embedded/model.safetensors",
        "es_finetune/models/embedded/tokenizer.json",
        "es_finetune/monitor/report.html.j2",
        "es_finetune/tasks/graders/reasoning.py",
        *(f"es_finetune/configs/{path.name}" for path in (ROOT / "python/es_finetune/configs").glob("*.yaml")),
    } <= set(names)
    assert installed(built, tmp_path) == ("reference", [], expected)


needs_gxx = pytest.mark.skipif(not shutil.which("g++") or platform.machine() != "x86_64", reason="needs g++ on x86-64")


@needs_gxx
def test_native_wheel(tmp_path, expected):
    built, output = wheel(tmp_path, ES_KERNELS_CUDA="0")
    assert built and built.name.endswith("-py3-none-linux_x86_64.whl"), output
    assert [n for n in zipfile.ZipFile(built).namelist() if n.endswith(".so")] == ["es_kernels/libes_cpu.so"]
    backend, isas, fingerprint = installed(built, tmp_path)
    assert (backend, isas[-1], fingerprint) == ("cpu", "baseline", expected)
    library = tmp_path / "site/es_kernels/libes_cpu.so"
    assert all(f"-DES_ISA={isa} " in output for isa in ("avx512", "avx2")) and "WARNING" not in output
    libraries = set(re.findall(r"NEEDED +(\S+)", objdump("-p", library)))
    assert libraries <= {"libc.so.6", "libm.so.6", "libpthread.so.0", "ld-linux-x86-64.so.2"}
    versions = set(re.findall(r"\*UND\*.*\((\S+)\)", objdump("-T", library)))
    assert "GLIBC_2.2.5" in versions
    newer = [v for v in versions if tuple(map(int, v.removeprefix("GLIBC_").split("."))) > (2, 28)]
    assert not newer, f"the library does not load where glibc is 2.28: it needs {newer}"


@needs_gxx
def test_wheel_by_a_compiler_without_avx(tmp_path, expected):
    """As one that is older than the processors: the wheel is slower, and gives the same bits."""
    compiler = tmp_path / "g++"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *-mavx*) echo "g++: error: unrecognized option"; exit 1;; esac\ng++ "$@"\n'
    )
    compiler.chmod(0o755)
    built, output = wheel(tmp_path, ES_KERNELS_CUDA="0", CXX=str(compiler))
    assert "WARNING: libes_cpu.so was built without avx512 and avx2" in output
    assert installed(built, tmp_path) == ("cpu", ["baseline"], expected)


# ---- make build, with compilers that only note what they are asked for ----

COMPILER = """#!/bin/sh
case "$*" in *--list-gpu-code*) printf '%s\\n' $KNOWN; exit;; *-dumpmachine*) echo $TARGET; exit;; esac
echo "$@" >> "$0.calls"
case "$0" in *nvcc) [ -z "$FAILS" ] || { echo "nvcc fatal: $FAILS"; exit 2; };; esac
case "$*" in *$REJECTED*) echo "error: unrecognized option"; exit 1;; esac
while [ "$1" != -o ]; do shift; done
: > "$2"
"""
KNOWN_TO_12_4 = "sm_50 sm_52 sm_53 sm_60 sm_61 sm_62 sm_70 sm_72 sm_75 sm_80 sm_86 sm_87 sm_89 sm_90"
KNOWN_TO_13_0 = "sm_75 sm_80 sm_86 sm_87 sm_88 sm_89 sm_90 sm_100 sm_110 sm_103 sm_120 sm_121"


@pytest.fixture
def make_build(tmp_path):
    """Runs it in a tree with a libes_cuda.so of an earlier build; returns (exit code, output, libraries, what nvcc was
    asked to build)."""
    for part in ("setup.py", "pyproject.toml", "Makefile", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, tmp_path / part)
    (tmp_path / "es_kernels").mkdir()
    (tmp_path / "another_folder").mkdir()
    (tmp_path / "es_kernels/libes_cuda.so").write_text("of an earlier build")
    (tmp_path / "cuda/bin").mkdir(parents=True)
    for compiler in ("g++", "nvcc"):
        (tmp_path / "cuda/bin" / compiler).write_text(COMPILER)
        (tmp_path / "cuda/bin" / compiler).chmod(0o755)

    def run(python=sys.executable, **environment):
        env = os.environ | {
            "CUDA_HOME": str(tmp_path / "cuda"),
            "CXX": str(tmp_path / "cuda/bin/g++"),
            "KNOWN": KNOWN_TO_13_0,
            "TARGET": "x86_64-linux-gnu",
            "REJECTED": "-no-option",
        }
        for name in ("ES_KERNELS_CUDA", "ES_KERNELS_CUDA_ARCHS"):
            env.pop(name, None)
        done = subprocess.run(
            ["make", "build", f"PYTHON={python}"], cwd=tmp_path, env=env | environment, capture_output=True, text=True
        )
        calls = tmp_path / "cuda/bin/nvcc.calls"
        asked = (
            [word.removeprefix("-gencode=") for word in calls.read_text().split() if "gencode" in word]
            if calls.exists()
            else []
        )
        libraries = {path.name: path.read_text() for path in (tmp_path / "es_kernels").glob("*.so")}
        return done.returncode, done.stdout + done.stderr, libraries, asked

    return run


def test_the_cuda_library_is_built_for_what_nvcc_knows(make_build):
    code, output, libraries, asked = make_build(KNOWN=KNOWN_TO_12_4)
    assert code == 0 and libraries == {"libes_cpu.so": "", "libes_cuda.so": ""}, output
    assert asked == ["arch=compute_80,code=[sm_80,compute_80]", "arch=compute_90,code=[sm_90,compute_90]"]
    assert "knows no sm_100, sm_120" in output


@pytest.mark.parametrize(
    "archs, asked",
    [
        ("", ["80,code=[sm_80,compute_80]", "90,code=sm_90", "100,code=sm_100", "120,code=[sm_120,compute_120]"]),
        ("120 75", ["75,code=[sm_75,compute_75]", "120,code=[sm_120,compute_120]"]),
    ],
)
def test_the_oldest_and_the_newest_architecture_bring_ptx(make_build, archs, asked):
    code, output, _, built = make_build(ES_KERNELS_CUDA_ARCHS=archs)
    assert code == 0 and built == [f"arch=compute_{a}" for a in asked], output
    assert "knows no" not in output


def test_an_architecture_asked_for_that_nvcc_does_not_know(make_build):
    code, output, libraries, _ = make_build(ES_KERNELS_CUDA_ARCHS="80 130")
    assert (
        code != 0 and "ES_KERNELS_CUDA_ARCHS='80 130'" in output and "nvcc knows no sm_130, only sm_75, sm_80" in output
    )
    assert libraries["libes_cuda.so"] == "of an earlier build"
    code, output, _, _ = make_build(ES_KERNELS_CUDA_ARCHS="90a")
    assert code != 0 and "ES_KERNELS_CUDA_ARCHS='90a': give plain numbers, as 90" in output


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"FAILS": "unsupported GNU version"}, "nvcc failed, as it says above"),
        ({"KNOWN": "sm_60 sm_70"}, "nvcc knows no sm_80, sm_90, sm_100, sm_120"),
    ],
)
def test_a_cuda_library_that_cannot_be_built(make_build, environment, words):
    """By default the rest is built, and nothing of an earlier build passes for it; asked for, it is an error."""
    code, output, libraries, _ = make_build(**environment)
    assert code == 0 and libraries == {"libes_cpu.so": ""}, output
    assert "WARNING: no libes_cuda.so was built" in output and words in output
    assert make_build(ES_KERNELS_CUDA="1", **environment)[0] != 0


def test_make_build_without_a_compiler(make_build):
    code, output, libraries, _ = make_build(CXX="no-such-compiler")
    assert code == 0 and list(libraries) == ["libes_cuda.so"] and "no C++ compiler (g++ or CXX) was found" in output
    code, output, _, _ = make_build(CXX="no-such-compiler", ES_KERNELS_CUDA="1")
    assert code != 0 and "nvcc needs a C++ compiler" in output


def gxx_calls(tmp_path):
    return (tmp_path / "cuda/bin/g++.calls").read_text().splitlines()


def test_an_instruction_set_that_the_compiler_rejects(make_build, tmp_path):
    """It is left out, of the table of those that there are too; without the last one there is no library."""
    code, output, libraries, _ = make_build(REJECTED="-mavx512vl", ES_KERNELS_CUDA="0")
    assert code == 0 and libraries["libes_cpu.so"] == "", output
    assert "WARNING: libes_cpu.so was built without avx512: " in output
    *_, table, _, link = gxx_calls(tmp_path)
    assert "-DES_ISAS(X)=X(avx2)X(baseline) -c" in table and "csrc/cpu.cpp" in table
    assert "/avx2.o" in link and "/baseline.o" in link and "/avx512.o" not in link
    assert make_build(REJECTED="-O3", ES_KERNELS_CUDA="0")[0] != 0


def test_the_compiler_says_what_is_built_for(make_build, tmp_path):
    """Not the machine that builds: CXX may be a cross compiler."""
    code, output, libraries, _ = make_build(TARGET="aarch64-linux-gnu", ES_KERNELS_CUDA="0")
    assert code == 0 and libraries["libes_cpu.so"] == "" and "-mavx" not in output, output
    assert any("-DES_ISA=neon" in call for call in gxx_calls(tmp_path))
    (tmp_path / "es_kernels/libes_cpu.so").unlink()
    code, output, libraries, _ = make_build(TARGET="riscv64-linux-gnu", ES_KERNELS_CUDA="0")
    assert code == 0 and "libes_cpu.so" not in libraries and "it is for x86-64 and aarch64, not riscv64" in output


def test_make_build_with_an_old_setuptools(make_build, tmp_path):
    """As RHEL 9 brings it: it has no bdist_wheel, and refuses pyproject.toml's license. Python 3.12 needs a newer
    one."""
    old = "53.0.0" if sys.version_info < (3, 12) else "69.5.1"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "-q", f"setuptools=={old}"], check=True)
    code, output, libraries, _ = make_build(python, PYTHONPATH="")
    assert code == 0 and libraries == {"libes_cpu.so": "", "libes_cuda.so": ""}, output


def test_cuda_asked_for_but_not_there(tmp_path):
    built, output = wheel(tmp_path, ES_KERNELS_CUDA="1", CUDA_HOME="/nonexistent")
    assert built is None and "nvcc was not found" in output
