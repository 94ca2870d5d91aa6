"""Contract under test: the task math (es_finetune.tasks.mathematics).

- Rows come from the hub's columns in any local form. What is left out is counted, and train and test share no problem.
- The score is math-verify's judgement of the last box.
- Hostile text gets no credit. What takes long to parse is killed in another process, and no answer is run as code.
"""

import json
import re

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from es_finetune.errors import UserError
from es_finetune.tasks import check_disjoint, load_task

from .conftest import TEXTS

MATH = [
    {"problem": "What is  1 + 1?", "solution": "It is $\\boxed{2}$.", "level": "Level 3", "type": "Algebra"},
    {
        "problem": "Half of 1?",
        "solution": "\\boxed{1} no, $\\boxed{\\frac{1}{2}}$.",
        "level": "Level 5",
        "type": "Algebra",
    },
    {"problem": "Easy?", "solution": "\\boxed{1}", "level": "Level 2", "type": "Algebra"},
    {"problem": "Unknown?", "solution": "\\boxed{1}", "level": "Level ?", "type": "Algebra"},
    {"problem": "Prove it.", "solution": "It is clear.", "level": "Level 4", "type": "Algebra"},
    {"problem": "Half  of 1?", "solution": "\\boxed{0.5}", "level": "Level 4", "type": "Algebra"},
    {"problem": "In both?", "solution": "\\boxed{1}", "level": "Level 4", "type": "Algebra"},
]


MATH_TEST = [
    {"question": " In\nboth? ", "answer": "1", "level": 1},
    {"question": "Two thirds?", "answer": "$\\frac{2}{3}$", "level": 5},
]


@pytest.fixture(scope="module")
def mathematics():
    return load_task("math", data=MATH, test_data=MATH_TEST, time_limit=2.0)


def test_math_reads_the_columns_and_counts_what_it_leaves_out(mathematics):
    assert [item.key for item in mathematics.train] == ["What is 1 + 1?", "Half of 1?"]
    assert [item.data["gold"] for item in mathematics.train] == ["2", "\\frac{1}{2}"]
    # Easy questions are left in the test data
    assert [item.data["gold"] for item in mathematics.test] == ["1", "\\frac{2}{3}"]
    system, user = mathematics.train[0].prompt
    assert system == {
        "role": "system",
        "content": "Please reason step by step, and put your final answer within \\boxed{}.",
    }
    assert user == {"role": "user", "content": "What is  1 + 1?"}
    assert (mathematics.metric, mathematics.floor, mathematics.eval_samples, mathematics.max_new_tokens) == (
        "exact",
        0.0,
        1,
        3000,
    )
    assert mathematics.notes == [
        "the train data: 2 of 7 rows left out, not of levels 3 to 5",
        "the train data: 1 of 7 rows left out, without an answer",
        "the train data: 1 of 7 rows left out, asked twice",
        "the train data: 1 of 7 rows left out, also in the test data",
    ]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "folder", "split folder", "save_to_disk", "dict to disk"])
def test_math_loads_local_files(kind, tmp_path, mathematics, monkeypatch):
    monkeypatch.setattr("es_finetune.tasks.mathematics.RewardProcess", lambda *_: None)  # nothing is graded here
    path = tmp_path / (f"data.{kind}" if kind in ("jsonl", "json", "parquet") else "data")
    data = datasets.Dataset.from_list(MATH)
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in MATH))
    elif kind == "json":
        path.write_text(json.dumps(MATH))
    elif kind == "parquet":
        data.to_parquet(path)
    elif kind == "save_to_disk":
        data.save_to_disk(path)
    elif kind == "dict to disk":
        datasets.DatasetDict({"train": data, "test": data.select([2])}).save_to_disk(path)
    else:
        path.mkdir()
        data.to_parquet(path / ("train.parquet" if kind == "split folder" else "rows.parquet"))
        if kind == "split folder":
            data.select([2]).to_parquet(path / "test.parquet")
    loaded = load_task("math", data=str(path), test_data=MATH_TEST)
    # All but where the questions are from.
    assert [item[:3] for item in loaded.train] == [item[:3] for item in mathematics.train]
    rows = [item.source.rpartition(", ")[2] for item in mathematics.train]
    assert [item.source for item in loaded.train] == [f"{path}, {row}" for row in rows]
    if kind in ("split folder", "dict to disk"):
        assert [item.key for item in load_task("math", data=MATH[:2], test_data=path).test] == ["Easy?"]


@pytest.mark.parametrize(
    "row, gold",
    [
        ({"answer": 142.0}, "142.0"),
        ({"answer": 33}, "33"),
        ({"answer": "$5$"}, "5"),
        ({"answer": "\\$5"}, "\\$5"),
        ({"answer": "", "solution": "\\boxed{3}"}, "3"),
        ({"answer": "so \\boxed{4}", "solution": "\\boxed{3}"}, "4"),
        ({"final_answer": ["1", "2"]}, "1, 2"),
    ],
)
def test_math_right_answers(row, gold, monkeypatch):
    monkeypatch.setattr("es_finetune.tasks.mathematics.RewardProcess", lambda *_: None)
    assert load_task("math", data=[{"problem": "p", **row}], test_data=MATH_TEST).train[0].data["gold"] == gold


@pytest.mark.parametrize(
    "data, problem",
    [
        ([], "the train data: no problem to train on, it is empty"),
        ([{"text": "a"}], "the train data, row 1: no problem; math reads the columns problem"),
        (["a"], "the train data, row 1: no problem"),
        (MATH[2:3], r"no problem to train on \(the train data: 1 of 1 rows left out, not of levels 3 to 5\)"),
        ("nowhere.jsonl", "train data 'nowhere.jsonl' cannot be loaded: there is no such file"),
    ],
)
def test_math_bad_data(data, problem):
    with pytest.raises(ValueError, match=problem):
        load_task("math", data=data, test_data=MATH_TEST)


@pytest.mark.parametrize("name, content", [("train.jsonl", b'{"problem": "a"}\n{"prob'), ("train.parquet", b"PAR1")])
@pytest.mark.parametrize("folder", [True, False])
def test_math_names_a_file_that_is_broken(tmp_path, name, content, folder):
    (tmp_path / name).write_bytes(content)
    source = tmp_path if folder else tmp_path / name
    with pytest.raises(UserError, match=f"^train data '{source}' cannot be loaded: ") as raised:
        load_task("math", data=source, test_data=MATH_TEST)
    assert "\n" not in str(raised.value)


def test_math_wants_to_know_the_split(tmp_path):
    data = datasets.Dataset.from_list(MATH)
    datasets.DatasetDict({"a": data, "b": data}).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match="has the splits a, b, and none is called train"):
        load_task("math", data=tmp_path / "data", test_data=MATH_TEST)


@pytest.mark.parametrize(
    "completion, exact, format",
    [
        ("so \\boxed{\\frac{1}{2}}", 1, 1),
        ("so \\boxed{0.5}", 1, 1),
        ("\\boxed{0.5} no, \\boxed{3}", 0, 1),
        ("\\boxed{3} no, \\boxed{\\frac{2}{4}}.", 1, 1),
        ("\\boxed{50\\%}", 1, 1),
        ("\\boxed{1/2}", 1, 1),
        ("\\boxed{2}", 0, 1),
        ("\\frac{1}{2}", 0, 0),
        ("0.5", 0, 0),
        ("", 0, 0),
        ("\\boxed{}", 0, 0),
    ],
)
def test_math_scores(mathematics, completion, exact, format):
    assert mathematics.score(mathematics.train[1], completion) == (exact, exact, format, None)


@pytest.fixture
def soon(mathematics, monkeypatch):
    """Answers that take long are killed after 0.5 s."""
    monkeypatch.setattr(mathematics._grade, "seconds", 0.5)


FRAMES = pytest.mark.parametrize("frame", ["{}", "x \\boxed{{{}}}", "\\boxed{{{}"])
LONG = ["9^{9^{9^9}}", "\\frac{1}{" * 200 + "3" + "}" * 200, "10!!!!", "\\text{" + "a" * 900 + "}"]


@FRAMES
def test_math_gives_hostile_answers_nothing(mathematics, hostile, frame, within):
    check_worth_nothing(mathematics, frame.format(hostile), frame, within)


@FRAMES
@pytest.mark.parametrize("text", LONG, ids=lambda text: ascii(text[:20]))
def test_math_gives_answers_that_take_long_nothing(mathematics, text, frame, within, soon):
    check_worth_nothing(mathematics, frame.format(text), frame, within)


def check_worth_nothing(mathematics, answer, frame, within):
    """What may take long is done by another process, which is killed: none of it in this one."""
    with within(5):
        score = mathematics.score(mathematics.train[0], answer)
    assert score.reward == score.exact == 0 and score.format in (0, 1)
    assert score.error is None or re.search("no result within .* s, killed", score.error)
    assert "x \\boxed" in frame or score.format == 0


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS, boxed=st.booleans())
def test_math_gives_any_text_a_score(mathematics, soon, is_a_score, within, text, boxed):
    with within(5):
        score = mathematics.score(mathematics.train[0], f"\\boxed{{{text}}}" if boxed else text)
    assert is_a_score(score) and (score.error is None or score.reward == 0)


def test_math_goes_on_after_a_kill(mathematics, soon, monkeypatch):
    error = mathematics.score(mathematics.train[0], "\\boxed{9^{9^{9^9}}}").error
    assert "no result within 0.5 s, killed" in error
    monkeypatch.setattr(mathematics._grade, "seconds", 5.0)
    assert mathematics.score(mathematics.train[0], "\\boxed{4/2}") == (1, 1, 1, None)


def test_math_runs_no_answer(mathematics, evil):
    for text in evil:
        assert mathematics.score(mathematics.train[0], f"\\boxed{{{text}}}").reward == 0


def test_math_is_disjoint(mathematics, monkeypatch):
    check_disjoint(mathematics)
    monkeypatch.setattr(mathematics, "test", [*mathematics.test, mathematics.train[0]])
    with pytest.raises(UserError, match=r"1 question\(s\) are both in train and in test"):
        check_disjoint(mathematics)
