"""Contract: one wheel for every Python: py3-none-linux_x86_64 with the libraries where there are compilers, pure without one, and then
the reference serves, with the same bits. The native library needs nothing but libc: no Python, torch or C++ runtime."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = """
import json, torch, es_kernels
t = torch.zeros(1000, dtype=torch.bfloat16)
es_kernels.add_noise_(t, [1, 2], [1.0, 0.5], name="w")
print(json.dumps([es_kernels.active_backend(), es_kernels.__file__, es_kernels.fingerprint({"w": t})]))
"""


def wheel(tmp_path, **environment):
    """Builds a wheel from a copy of the sources, as a source distribution would be; returns its path and pip's output."""
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for part in ("es_kernels", "csrc", "python"):
        shutil.copytree(ROOT / part, source / part, ignore=ignore)
    for part in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, source / part)
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--wheel-dir", str(tmp_path / "dist"), str(source)]
    run = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    wheels = list((tmp_path / "dist").glob("*.whl"))
    return (wheels[0] if wheels else None), run.stdout + run.stderr


def installed(built, tmp_path):
    """What a process says that imports es_kernels from the unpacked wheel."""
    site = tmp_path / "site"
    with zipfile.ZipFile(built) as z:
        z.extractall(site)
    run = subprocess.run([sys.executable, "-c", PROGRAM], env={**os.environ, "PYTHONPATH": str(site)}, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    backend, file, fingerprint = __import__("json").loads(run.stdout)
    assert pathlib.Path(file).is_relative_to(site)
    return backend, fingerprint


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
    assert not [n for n in names if n.endswith(".so")]
    assert {"es_kernels/NOISE.md", "es_kernels/golden.json", "es_finetune/models/countdown_char/model.safetensors"} <= set(names)
    assert installed(built, tmp_path) == ("reference", expected)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_native_wheel(tmp_path, expected):
    built, output = wheel(tmp_path, ES_KERNELS_CUDA="0")
    assert built and built.name.endswith("-py3-none-linux_x86_64.whl"), output
    assert [n for n in zipfile.ZipFile(built).namelist() if n.endswith(".so")] == ["es_kernels/libes_cpu.so"]
    assert installed(built, tmp_path) == ("cpu", expected)
    needed = subprocess.run(["objdump", "-p", str(tmp_path / "site/es_kernels/libes_cpu.so")], capture_output=True, text=True).stdout
    libraries = {line.split()[1] for line in needed.splitlines() if line.strip().startswith("NEEDED")}
    assert libraries <= {"libc.so.6", "libm.so.6", "libpthread.so.0", "ld-linux-x86-64.so.2"}


def test_cuda_asked_for_but_not_there(tmp_path):
    built, output = wheel(tmp_path, ES_KERNELS_CUDA="1", CUDA_HOME="/nonexistent")
    assert built is None and "nvcc was not found" in output
