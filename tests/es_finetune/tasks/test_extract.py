"""Contract under test: what is graded of a completion (es_finetune.tasks.extract): its last block or box."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from es_finetune.tasks.extract import MAX_BOXED, last_block, last_boxed


@pytest.mark.parametrize(
    "text, inside",
    [
        ("\\boxed{5}", "5"),
        ("so \\boxed{1} or $\\boxed{ \\frac{1}{2} }$.", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{a}}", "a"),
        ("$\\boxed 5$", "5"),
        ("\\boxed{\\boxed{7}}", "7"),
        ("\\boxed{}", None),
        ("\\boxed{ }", None),
        ("\\boxed{5", None),
        ("\\boxed{1} \\boxed{", None),
        ("\\boxed", None),
        ("boxed{5}", None),
        ("\\boxed{" + "1" * (MAX_BOXED - 2) + "}", "1" * (MAX_BOXED - 2)),
        ("\\boxed{" + "1" * (MAX_BOXED - 1) + "}", None),
    ],
    ids=lambda text: ascii(text)[:30],
)
def test_the_last_box(text, inside):
    assert last_boxed(text) == inside


@given(st.text("ab<>/\\{}xnswer boxed"), st.text("ab{}", max_size=20))
def test_extraction_takes_any_text(text, more):
    assert last_block(text + "<answer>x</answer>", "answer") == "x"
    assert last_boxed(text + "\\boxed{x}") == "x"
    for result in (last_boxed(text + "\\boxed{" + more), last_block(text + "</answer>" + more, "answer")):
        assert result is None or result in text + "\\boxed{" + more
