"""Fixtures of tests/es_finetune/tasks: answers that no task may give credit, answers that would run code, any text."""

import math

import pytest
from hypothesis import strategies as st

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


# Any characters, halves of surrogate pairs too; and what tasks look for, in any order and number.
PARTS = r"""<answer> </answer> <think> </think> \boxed{ \boxed \frac{ } { ( ) [ ] + - * ** / // . , = ! ^ _ \ $ 3+4+7
    9**9**9 1/0 1e999 nan inf sqrt( x \text{ \sqrt \infty 10!! lambda __import__""".split()
TEXTS = st.text(st.characters(exclude_categories=())) | st.lists(
    st.builds(
        str.__mul__,
        st.sampled_from([*PARTS, "</think>\n<answer>", "\n", " ", "\x00", "\u0663", "\ud800"])
        | st.integers(0, 200).map(str),
        st.sampled_from([1] * 8 + [2, 30]) | st.sampled_from([1, 5000]),
    ),
    max_size=12,
).map("".join)


@pytest.fixture(scope="session")
def is_a_score():
    """Whether a score is one that can be trained on and reported."""

    def check(score):
        shares = [share for share in (score.exact, score.format) if share is not None]
        assert math.isfinite(score.reward) and all(0 <= share <= 1 for share in shares)
        assert score.error is None or "\n" not in score.error
        return True

    return check
