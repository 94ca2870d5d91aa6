"""Contract under test: what a log's header says of software and hardware. It names no folder, takes no memory of a GPU,
and tells a machine without a GPU from a run that does not use it."""

import platform

import pytest
import torch

from es_finetune.runs import environment


@pytest.mark.parametrize(
    "text, shown",
    [
        ("/home/ann/.venv/lib/libes_cuda.so: cannot open shared object", "libes_cuda.so: cannot open shared object"),
        ("ImportError: no libcuda.so.1 (in /usr/lib/x/y)", "ImportError: no libcuda.so.1 (in y)"),
        ("13.0 / 12.8, see https://docs.example.org/a/b", "13.0 / 12.8, see https://docs.example.org/a/b"),
    ],
)
def test_of_a_path_the_last_name_is_left(text, shown):
    assert environment.probe(lambda: text) == shown


def test_versions_are_those_that_are_installed():
    import transformers

    import es_kernels

    assert environment.versions() == {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "es_kernels": es_kernels.__version__,
    }


@pytest.fixture
def driver_files(monkeypatch, tmp_path):
    """A machine with two GPUs, whose driver names them; no process has used one."""
    for number in range(2):
        (tmp_path / f"gpus/000{number}").mkdir(parents=True)
        (tmp_path / f"gpus/000{number}/information").write_text("Model: \t\t NVIDIA H200\nIRQ:   \t\t 18\n")
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23\n")
    monkeypatch.setattr(environment, "_NVIDIA", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: pytest.fail("takes memory of the GPU"))


def test_a_gpu_is_named_with_its_driver(driver_files):
    used = environment.machine("cuda in vLLM")
    assert used["gpu"] == "NVIDIA H200, NVIDIA H200" and used["driver"] == "580.95.05" and used["processor"]


def test_a_gpu_that_is_not_used_is_called_so(driver_files):
    unused = environment.machine("cpu")
    assert unused["gpu"] == unused["driver"] == "not used"


def test_without_a_gpu_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert environment.machine("cpu")["gpu"] == environment.machine("reference")["driver"] == "none"
