"""Contract under test: `es-finetune env` says what an issue report needs, and nothing of who and where."""

import getpass
import sys
import types
from pathlib import Path

from es_finetune.commands import env


def test_what_is_broken_is_told_in_its_own_words(monkeypatch):
    def broken(name):
        raise RuntimeError(f"the metadata of {name} in {Path.home()}/lib/python is torn\nand more")

    monkeypatch.setattr(env, "version", broken)
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
