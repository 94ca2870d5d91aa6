"""Contract under test: the fields of a run's files.

Every field has a meaning, and docs/files.md says what the types say. That a run writes exactly these fields is in
test_trainer.py.
"""

from pathlib import Path

from es_finetune.monitor.fields_page import fields_page

DOCS = Path(__file__).parents[3] / "docs"


def test_the_committed_page_is_the_one_that_is_made():
    assert (DOCS / "files.md").read_text() == fields_page(), (
        "run python -m es_finetune.monitor.fields_page > docs/files.md"
    )


def test_the_page_says_type_and_meaning_of_a_field():
    lines = fields_page().splitlines()
    assert "| `failed_example` | text or null | the first of them, and why |" in lines
    assert "| `exact` | number or null | share of right answers; null where the task knows none |" in lines
