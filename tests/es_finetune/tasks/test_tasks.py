"""Contract under test: a task by its name (es_finetune.tasks.load_task).

- Train and test share no question.
- A task that cannot be had is one sentence; packages are imported only by the tasks that need them.
"""

import importlib.util
import subprocess
import sys

import pytest

from es_finetune.errors import UserError
from es_finetune.tasks import check_disjoint, load_task


def test_an_unknown_task_is_named():
    names = "countdown, countdown-char, conciseness, short-answers, math, reasoning-gym:<name>, custom"
    with pytest.raises(UserError, match=f"unknown task 'sudoku'; choose one of: {names}"):
        load_task("sudoku")


@pytest.mark.parametrize("name", ["countdown", "countdown-char", "conciseness", "short-answers"])
def test_every_task_is_disjoint_and_says_so_if_not(name):
    task = load_task(name)
    assert not {item.key for item in task.train} & {item.key for item in task.test}
    task.test = [*task.test, task.train[0]]
    with pytest.raises(ValueError, match=r"1 question\(s\) are both in train and in test"):
        check_disjoint(task)


@pytest.mark.parametrize("name, package", [("math", "math_verify"), ("reasoning-gym:mini_sudoku", "reasoning_gym")])
def test_a_missing_package_is_named_with_its_extra(name, package, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda module, *rest: None if module == package else find(module, *rest)
    )
    with pytest.raises(
        ValueError, match=rf"needs the package {package.replace('_', '-')}: pip install 'es-kernels\[tasks\]'"
    ):
        load_task(name)


def test_packages_are_imported_only_where_they_are_needed():
    script = (
        "import sys\nfrom es_finetune.tasks import load_task\n"
        "load_task('countdown'); load_task('conciseness'); load_task('short-answers')\n"
        "load_task('custom', data=[{'prompt': str(i)} for i in range(9)], reward=lambda c, i: 0)\n"
        "heavy = {'torch', 'datasets', 'math_verify', 'sympy', 'reasoning_gym', 'transformers'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
