"""Contract under test: the fields of a run's files, and the quantiles and lengths in them.

Every field has a meaning, and docs/reference/files.md says what the types say. That a run writes exactly these fields
is in test_trainer.py.
"""

from pathlib import Path
from types import SimpleNamespace

from es_finetune.engines import Answer
from es_finetune.evaluation.evaluator import Evaluation
from es_finetune.monitor.fields_page import PURPOSES, fields_page
from es_finetune.monitor.rows import eval_row, member_line, population_row
from es_finetune.runs.folder import CURVES, FILES, FOLDERS
from es_finetune.tasks import Score

DOCS = Path(__file__).parents[3] / "docs"


def test_the_committed_page_is_the_one_that_is_made():
    assert (DOCS / "reference/files.md").read_text() == fields_page(), (
        "run python -m es_finetune.monitor.fields_page > docs/reference/files.md"
    )


def test_the_page_says_type_and_meaning_of_a_field():
    lines = fields_page().splitlines()
    assert "| `failed_example` | text or null | the first of them, and why |" in lines
    assert "| `exact` | number or null | share of right answers; null where the task knows none |" in lines


def test_the_page_says_what_each_file_of_a_run_is_for():
    assert set(PURPOSES) == {*FILES, *FOLDERS, *CURVES}


def evaluation(*lengths, reward=1.0):
    answers = [Answer("x" * length, tuple(range(length))) for length in lengths]
    return Evaluation(answers, [Score(reward, reward)] * len(lengths), 1.0, 0.0)


def test_a_generation_has_the_quantiles_of_its_members_and_the_mean_length_of_an_answer():
    members = [member_line(0, n, evaluation(2, 6, reward=float(n))) for n in range(5)]
    row = population_row(members, [[float(n)] * 2 for n in range(5)], 9.0, 1)
    assert [row[f"reward_q{p}"] for p in (25, 50, 75)] == [1.0, 2.0, 3.0]
    assert row["tokens"] == 40 and row["answer_tokens"] == 4.0
    halved = population_row(members, [[float(n)] for n in range(5)], 9.0, 1, samples=2)
    assert halved["answer_tokens"] == 4.0  # of each prompt two answers
    read = population_row([{**line, "tokens": 0} for line in members], [[1.0]] * 5, 9.0, 1)
    assert read["answer_tokens"] is None


def test_an_eval_has_the_quantiles_of_its_answers_lengths():
    row = eval_row(SimpleNamespace(metric="exact", floor=0.0), evaluation(*range(11)), 3, 1.0)
    assert (row["answer_tokens"], row["answer_tokens_q10"], row["answer_tokens_q90"]) == (5.0, 1.0, 9.0)
