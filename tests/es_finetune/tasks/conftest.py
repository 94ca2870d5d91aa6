"""Fixtures of tests/es_finetune/tasks: answers that no task may give credit, and answers that would run code."""

import pytest

HOSTILE = [
    "",
    "9**9**9**9",
    "(" * 100_000,
    "(" * 100_000 + "1" + ")" * 100_000,
    "-" * 100_000 + "1",
    "1+" * 50_000 + "1",
    "9" * 100_000,
    "3+4+7+1/0",
    "3+4+7 if 1 else 0",
    "__import__('os').getcwd()",
    "３+４+７",  # full-width digits, which str.isdigit and \d accept
    "³+4+7",
    "3+4+٧",
    "nan",
    "inf",
    "1e9",
    "0x0e",
    "3+4+7\n",
    "3+4+7\x00",
    "3+4+07",
    "3_+4+7",
    "3,4,7",
    "3 4 7",
    "3+4+7)",
    "()",
    "3+*4+7",
    "3//4",
    "<answer>" * 20_000,
    "\ud800",
]


@pytest.fixture(params=HOSTILE, ids=lambda text: ascii(text[:20]))
def hostile(request):
    """One text after the other that is no right answer to anything, and that costs whoever parses it carelessly."""
    return request.param


@pytest.fixture
def evil(tmp_path):
    """Answers of which each would run code; those that could then write a file. None may exist after the test."""
    file = tmp_path / "evil"
    yield [text.format(file=file) for text in EVIL]
    assert not file.exists()


EVIL = [
    "__import__('os').system('touch {file}')",
    "open('{file}', 'w')",
    "[open('{file}', 'w')]",
    "exec(\"open('{file}', 'w')\")",
    "sin(\"open('{file}', 'w')\")",
    "Symbol.__init__.__globals__",
    "[x for x in (1,)]",
    "(lambda: 1)()",
]
