"""Contract: `make` alone prints a line about every command a user may give, and changes nothing. What .ci/run and the
workflows make is there. Plain `pytest` is what `make test` runs: the marks of whole folders leave out the rest."""

import os
import pathlib
import re
import subprocess
from types import SimpleNamespace

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()


def test_make_alone_lists_all_commands():
    command = ["make", "-C", ROOT, "--no-print-directory"]
    page = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    phony = re.search(r"^\.PHONY:((?:.*\\\n)*.*)$", MAKEFILE, re.M)[1]
    commands = set(phony.replace("\\", "").split()) - {"help"}
    assert {words.split()[-1] for words in re.findall(r"^  make( [a-z0-9 -]+?)  ", page, re.M)} == commands


def test_what_scripts_make_is_there():
    phony = re.search(r"^\.PHONY:((?:.*\\\n)*.*)$", MAKEFILE, re.M)[1].split()
    for script in (ROOT / ".ci/run", *ROOT.glob(".github/workflows/*.yml")):
        asked = re.findall(r"^(?: *- run: | *run: )?make (\S+)$", script.read_text(), re.M)
        assert set(asked) <= set(phony), script


@pytest.mark.parametrize("target", ("fuzz", "test-aarch64"))
@pytest.mark.parametrize("user", (0, 1000))
def test_what_is_missing_is_installed_as_root(tmp_path, target, user):
    (tmp_path / "id").write_text(f"#!/bin/sh\necho {user}\n")
    (tmp_path / "id").chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = subprocess.run(["make", "-C", ROOT, "-n", target], env=env, capture_output=True, text=True, check=True)
    assert re.findall(r"(\w*) +apt-get", command.stdout) == 2 * ["sudo" if user else ""]


def test_the_quick_tests_are_there():
    command = subprocess.run(["make", "-C", ROOT, "-n", "test-quick"], capture_output=True, text=True, check=True)
    paths = re.findall(r"tests/\S+", command.stdout)
    assert len(paths) > 5 and all((ROOT / path).exists() for path in paths)


@pytest.mark.parametrize("mark", ("gpu", "distributed", "vllm"))
def test_a_folder_is_left_out_by_its_mark(mark, request):
    (root_conftest,) = (
        plugin
        for plugin in request.config.pluginmanager.get_plugins()
        if getattr(plugin, "__file__", None) == str(ROOT / "tests/conftest.py")
    )
    marks = {"inside": [], "beside": []}
    items = [
        SimpleNamespace(nodeid=where, path=ROOT / path, add_marker=marks[where].append)
        for where, path in (("inside", f"tests/{mark}/test_it.py"), ("beside", f"tests/es_kernels/test_{mark}.py"))
    ]
    root_conftest.pytest_collection_modifyitems(items)
    assert marks == {"inside": [mark], "beside": []}
    assert f"not {mark}" in " ".join(request.config.getini("addopts"))
