"""Contract under test: `es-finetune env` says what an issue report needs, and nothing of who and where."""

import getpass
import sys
import types
from pathlib import Path

import pytest

from es_finetune.commands import env


@pytest.mark.parametrize(
    "text, shown",
    [
        ("/home/ann/.venv/lib/libes_cuda.so: cannot open shared object", "libes_cuda.so: cannot open shared object"),
        ("ImportError: no libcuda.so.1 (in /usr/lib/x/y)", "ImportError: no libcuda.so.1 (in y)"),
        ("13.0 / 12.8, see https://docs.example.org/a/b", "13.0 / 12.8, see https://docs.example.org/a/b"),
    ],
)
def test_of_a_path_the_last_name_is_left(text, shown):
    assert env._probe(lambda: text) == shown


def test_what_is_broken_is_told_in_its_own_words(monkeypatch):
    def broken(name):
        raise RuntimeError(f"the metadata of {name} in {Path.home()}/lib/python is torn\nand more")

    monkeypatch.setattr(env, "_version", broken)
    facts = env.environment()
    assert facts["torch"] == "unknown: RuntimeError: the metadata of torch in python is torn"
    assert facts["backend reference"] == "available" and facts["serves cpu"]
    assert f"/{getpass.getuser()}" not in " ".join(facts.values())


def test_of_an_import_that_fails_the_first_line_is_told(monkeypatch):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise ImportError("/opt/lib/libtorch.so: undefined symbol\n  in a build for another torch")

    monkeypatch.setitem(sys.modules, "es_kernels", Broken("es_kernels"))
    assert env.environment()["backends"] == "unknown: ImportError: libtorch.so: undefined symbol"
