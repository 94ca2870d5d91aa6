"""Contract under test: the tasks.

- Train and test share no question. The items are the same for ever.
- Countdown: an answer gets credit only if it uses exactly the given numbers and has the value. Arithmetic is exact.
- Conciseness is its formula, math is math-verify's judgement of the last box, reasoning-gym the dataset's own score.
- Hostile text gets no credit for its answer, raises nothing and costs next to nothing, or at most the time limit where
  another process has to parse it. Nothing a model wrote is evaluated as code in this process.
- A task that cannot be had is one sentence; packages are imported only by the tasks that need them.
"""

import base64
import importlib.util
import itertools
import json
import pickle
import subprocess
import sys
from fractions import Fraction

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from es_finetune.tasks import Item, check_disjoint, load_task
from es_finetune.tasks.arithmetic import MAX_DEPTH, MAX_LENGTH, evaluate
from es_finetune.tasks.conciseness import Conciseness
from es_finetune.tasks.countdown import Countdown
from es_finetune.tasks.countdown_char import CountdownChar, solutions
from es_finetune.tasks.extract import MAX_BOXED, last_block, last_boxed

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


@pytest.mark.parametrize(
    "text, value, numbers",
    [
        ("3+4+7", 14, [3, 4, 7]),
        (" ( 1 + 2 ) / 3 ", 1, [1, 2, 3]),
        ("1/3*3", 1, [1, 3, 3]),
        ("2-3-4", -5, [2, 3, 4]),
        ("8/2/2", 2, [8, 2, 2]),
        ("2+3*4", 14, [2, 3, 4]),
        ("-(2-5)", 3, [2, 5]),
        ("1/3+1/6", Fraction(1, 2), [1, 3, 1, 6]),
        ("0", 0, [0]),
    ],
)
def test_arithmetic_is_exact(text, value, numbers):
    assert evaluate(text) == (value, numbers)


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:20]))
def test_arithmetic_refuses_what_is_none(text, within):
    with within(3):
        assert evaluate(text) is None


def test_arithmetic_bounds_are_where_they_are_said_to_be():
    def nested(depth):
        return "(" * depth + "1" + ")" * depth

    assert evaluate(nested(MAX_DEPTH)) == (1, [1]) and evaluate(nested(MAX_DEPTH + 1)) is None
    assert evaluate("1" + " " * (MAX_LENGTH - 1)) and evaluate("1" + " " * MAX_LENGTH) is None


# --- countdown -------------------------------------------------------------------------------------------------------

ITEM = Item("", ((3, 4, 7), 14))


def test_countdown_is_the_papers():
    task = load_task("countdown")
    assert (len(task.train), len(task.test), task.max_new_tokens) == (200, 2000, 1024)
    keys = [item.key for item in [*task.train, *task.test]]
    assert len(set(keys)) == 2200
    for item in [*task.train, *task.test]:
        numbers, target = item.key
        assert len(numbers) in (3, 4) and all(1 <= n <= 99 for n in numbers) and 10 <= target <= 100
        assert item.prompt.endswith("\n<think>") and f" {target}. " in item.prompt
    assert {len(key[0]) for key in keys} == {3, 4}
    assert [item.prompt for item in Countdown().test] == [item.prompt for item in task.test]
    assert task.test[0] not in Countdown(seed=1).test
    assert task.train[0].key == ((35, 43, 47), 31)


def test_every_countdown_question_has_an_answer():
    def reachable(values):
        if len(values) == 1:
            yield values[0]
        for i, j in itertools.permutations(range(len(values)), 2):
            rest = [v for k, v in enumerate(values) if k not in (i, j)]
            a, b = values[i], values[j]
            for value in (a + b, a - b, a * b) + ((a / b,) if b else ()):
                yield from reachable([*rest, value])

    for item in Countdown().train[:30]:
        assert item.key[1] in reachable([Fraction(n) for n in item.key[0]])


@pytest.mark.parametrize(
    "completion, exact, format",
    [
        ("so</think>\n<answer>3+4+7</answer>", 1, 1.0),
        ("</think>\n<answer> 7 + (4 + 3) </answer>", 1, 1.0),
        ("so</think> <answer>3+4+7</answer>", 1, 0.6),  # no newline between the blocks
        ("so</think>\n<answer>3+4+7</answer>.", 1, 0.6),
        ("<answer>3+4+7</answer>", 1, 0.5),
        ("so</think>", 0, 0.1),
        ("so</think>\n<answer>3*4+7</answer>", 0, 1.0),
        ("so</think>\n<answer>7+7</answer>", 0, 1.0),
        ("so</think>\n<answer>3+4+7+0</answer>", 0, 1.0),
        ("so</think>\n<answer>14</answer>", 0, 1.0),
        ("a</think>\n<answer>3+4+7</answer> no, <answer>1</answer>", 0, 0.6),  # the last one counts
        ("a</think>\n<answer>1</answer> no, <answer>3+4+7</answer>", 1, 0.6),
        ("</answer></think>", 0, 0.1),
        ("3+4+7", 0, 0.0),
    ],
)
def test_countdown_scores(completion, exact, format):
    score = Countdown(train=1, test=1).score(ITEM, completion)
    assert (score.exact, score.format) == (exact, pytest.approx(format))
    assert score.reward == pytest.approx(exact + 0.1 * format)


def test_countdown_accepts_the_papers_tolerance_and_no_more():
    task = Countdown(train=1, test=1)
    near = Item("", ((1, 14, 9999), 14))
    assert task.score(near, "</think>\n<answer>14+1/9999</answer>").exact == 0
    near = Item("", ((1, 14, 999, 999), 14))
    assert task.score(near, "</think>\n<answer>14+1/999/999</answer>").exact == 1


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:20]))
@pytest.mark.parametrize("frame", ["{}", "x</think>\n<answer>{}</answer>", "<answer>{}", "{}</answer>"])
def test_countdown_gives_hostile_answers_at_most_their_format(text, frame, within):
    with within(3):
        score = Countdown.score(None, ITEM, frame.format(text))
    assert score.exact == (text == "3+4+7\n" and "</think>" in frame)  # white space around an answer is no fault
    assert score.reward == pytest.approx(score.exact + 0.1 * score.format) and score.format <= 1


# --- countdown-char --------------------------------------------------------------------------------------------------


def test_countdown_char_splits_by_multiset_and_target():
    task = load_task("countdown-char")
    train, test = ({item.key for item in items} for items in (task.train, task.test))
    assert not train & test and len(train) + len(test) == 1345
    assert len(test) == len(task.test)
    for item in [*task.train, *task.test]:
        numbers, target = item.prompt[1:-1].split("=")
        assert (tuple(sorted(map(int, numbers.split(",")))), int(target)) == item.key
    assert [item.prompt for item in CountdownChar().test] == [item.prompt for item in task.test]
    assert task.test[0].prompt == "^1,8,7=2:"  # the embedded model was trained on this split: it must never move


def test_countdown_char_knows_every_answer():
    task = CountdownChar()
    for (numbers, target), answers in solutions().items():
        assert 0 <= target <= 99
        for answer in answers:
            assert task.score(Item("", (numbers, target)), answer) == (1.0, 1.0, 1.0, None)


@pytest.mark.parametrize(
    "completion, exact, format",
    [
        ("3+4+7", 1, 1),
        ("7+3+4", 1, 1),
        ("3+4*7", 0, 1),
        ("3+4+8", 0, 1),
        ("hm,3+4+7", 0, 0),
        ("3+4+7+", 0, 0),
        ("3+4", 0, 0),
        ("7+7+0", 0, 0),
    ],
)
def test_countdown_char_scores(completion, exact, format):
    score = CountdownChar.score(None, ITEM, completion)
    assert score == (pytest.approx(0.1 * format + 0.9 * exact), exact, format, None)


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:20]))
def test_countdown_char_gives_hostile_answers_nothing(text):
    assert CountdownChar.score(None, ITEM, text) == (0, 0, 0, None)


# --- what is graded of a completion -----------------------------------------------------------------------------------


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
    for found in (last_boxed(text + "\\boxed{" + more), last_block(text + "</answer>" + more, "answer")):
        assert found is None or found in text + "\\boxed{" + more


# --- conciseness -----------------------------------------------------------------------------------------------------


def test_conciseness_is_the_papers():
    task = load_task("conciseness")
    assert (len(task.train), len(task.test), task.max_new_tokens, task.metric, task.eval_samples) == (
        2,
        8,
        100,
        "reward",
        20,
    )
    assert [item.data["target"] for item in task.train] == ["8", "No"]
    for item in [*task.train, *task.test]:
        assert [message["role"] for message in item.prompt] == ["user"] and item.prompt[0]["content"] == item.key
        assert task.score(item, item.data["target"]) == (0.0, None, None, None)


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=())))
def test_conciseness_is_its_formula(text):
    task = Conciseness()
    for item, target in zip(task.train, (1, 2), strict=True):
        assert task.score(item, text) == (-abs(len(text) - target), None, None, None)


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:20]))
def test_conciseness_of_hostile_answers(text, within):
    task = Conciseness()
    with within(3):
        assert task.score(task.train[0], text).reward == -abs(len(text) - 1) <= 0


# --- math ------------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize(
    "text",
    [*HOSTILE, "9^{9^{9^9}}", "\\frac{1}{" * 200 + "3" + "}" * 200, "10!!!!", "\\text{" + "a" * 900 + "}"],
    ids=lambda text: ascii(text[:20]),
)
@pytest.mark.parametrize("frame", ["{}", "x \\boxed{{{}}}", "\\boxed{{{}"])
def test_math_gives_hostile_answers_nothing(mathematics, text, frame, within):
    """What may take long is done by another process, which is killed: none of it in this one."""
    with within(5):
        score = mathematics.score(mathematics.train[0], frame.format(text))
    assert score.reward == score.exact == 0 and score.format in (0, 1)
    assert score.error is None or "no result within 2 s, killed" in score.error
    assert "x \\boxed" in frame or score.format == 0


def test_math_goes_on_after_a_kill(mathematics):
    assert "no result within 2 s, killed" in mathematics.score(mathematics.train[0], "\\boxed{9^{9^{9^9}}}").error
    assert mathematics.score(mathematics.train[0], "\\boxed{4/2}") == (1, 1, 1, None)


# --- reasoning-gym ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sudoku():
    return load_task("reasoning-gym:mini_sudoku", time_limit=2.0)


def solve(puzzle):
    """The solution of the 4 x 4 grid in a question, found by trying."""
    rows = [
        [0 if cell == "_" else int(cell) for cell in line.split()]
        for line in puzzle.split("\n")
        if len(line.split()) == 4 and set(line) <= set("1234_ ")
    ]
    for cells in itertools.product(itertools.permutations((1, 2, 3, 4)), repeat=4):
        if (
            all(
                given in (0, cell)
                for row, line in zip(rows, cells, strict=True)
                for given, cell in zip(row, line, strict=True)
            )
            and all(len(set(column)) == 4 for column in zip(*cells, strict=True))
            and all(
                len({cells[i][j], cells[i][j + 1], cells[i + 1][j], cells[i + 1][j + 1]}) == 4
                for i in (0, 2)
                for j in (0, 2)
            )
        ):
            return "\n".join(" ".join(map(str, line)) for line in cells)


def test_sudoku(sudoku):
    assert (sudoku.name, len(sudoku.train), len(sudoku.test), sudoku.metric, sudoku.floor) == (
        "reasoning-gym:mini_sudoku",
        200,
        500,
        "exact",
        0.0,
    )
    item = sudoku.train[0]
    assert [message["role"] for message in item.prompt] == ["system", "user"] and "<answer>" in item.prompt[0][
        "content"
    ]
    answer = solve(item.key)
    assert sudoku.score(item, f"hm <answer>\n{answer}\n</answer>") == (1.0, 1.0, 1.0, None)
    assert sudoku.score(item, f"<answer>1</answer> <answer>{answer}</answer>").exact == 1
    assert sudoku.score(item, f"<answer>{answer}</answer> <answer>1</answer>").exact == 0
    assert sudoku.score(item, answer) == (0.0, 0.0, 0.0, None)
    assert sudoku.score(sudoku.train[1], f"<answer>{answer}</answer>").exact == 0


def test_questions_are_the_same_every_time_and_others_with_another_seed(sudoku):
    again, other = load_task("reasoning-gym:mini_sudoku"), load_task("reasoning-gym:mini_sudoku", seed=1)
    assert again.train == sudoku.train and again.test == sudoku.test
    assert not {item.key for item in other.train} & {item.key for item in [*sudoku.train, *sudoku.test]}


def test_arc():
    task = load_task("reasoning-gym:arc_agi")
    assert len(task.train) == 200 and len(task.test) == 500
    score = task.score(task.train[0], "<answer>1 2\n3 4</answer>")
    assert 0 <= score.reward < 0.1 and score[1:] == (0.0, 1.0, None)


def test_few_questions_are_cut_in_proportion():
    task = load_task("reasoning-gym:coin_flip")
    total = len(task.train) + len(task.test)
    assert total < 700 and len(task.train) == total * 2 // 7
    assert task.notes == [f"reasoning-gym:coin_flip has no more than {total} different questions"]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:20]))
@pytest.mark.parametrize("frame", ["{}", "<answer>{}</answer>", "<answer>{}"])
def test_sudoku_gives_hostile_answers_nothing(sudoku, text, frame, within):
    with within(5):
        score = sudoku.score(sudoku.train[0], frame.format(text))
    # The dataset's score gives 0.1 for the share of cells that happen to be right.
    assert score.exact == 0 and score.reward < 0.1 and score.format == ("</answer>" in frame)


def test_a_scorer_that_evaluates_is_killed(within):
    task = load_task("reasoning-gym:binary_matrix", time_limit=2.0)
    for text, problem in (
        ("9**9**9**9", "no result within 2 s, killed"),
        ("(" * 10_000, None),
        ("__import__('os')._exit(0)", None),
    ):
        with within(5):
            score = task.score(task.train[0], f"<answer>{text}</answer>")
        assert score[:3] == (0.0, 0.0, 1.0) and (problem is None or problem in score.error)


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


@pytest.mark.parametrize(
    "name, good, reward",
    [
        ("spiral_matrix", "[{}]", 0.1),
        ("polynomial_multiplication", "({})*1", 1),
        ("simple_integration", "{} + C - C", 1),
    ],
)
def test_no_grader_runs_an_answer(name, good, reward, tmp_path):
    """Nor does it lose what needs a scorer's own reading: a list is part of the credit, another form of a formula all
    of it."""
    task = load_task(f"reasoning-gym:{name}")
    entry = pickle.loads(base64.b64decode(task.train[0].data["entry"]))
    for text in EVIL:
        assert task.score(task.train[0], f"<answer>{text.format(file=tmp_path / 'evil')}</answer>").reward == 0
    assert not (tmp_path / "evil").exists()
    answer = ", ".join(entry["answer"].split()) if name == "spiral_matrix" else entry["answer"]
    assert task.score(task.train[0], f"<answer>{good.format(answer)}</answer>") == (reward, reward == 1, 1.0, None)


def test_an_answer_that_repeats_the_question_is_none():
    task = load_task("reasoning-gym:simple_integration")
    metadata = pickle.loads(base64.b64decode(task.train[0].data["entry"]))["metadata"]
    assert (
        task.score(task.train[0], f"<answer>Integral({metadata['integrand']}, {metadata['variable']})</answer>").reward
        == 0
    )


def test_math_runs_no_answer(mathematics, tmp_path):
    for text in EVIL:
        assert mathematics.score(mathematics.train[0], f"\\boxed{{{text.format(file=tmp_path / 'evil')}}}").reward == 0
    assert not (tmp_path / "evil").exists()


def test_no_number_is_not_the_right_number():
    task = load_task("reasoning-gym:complex_arithmetic")
    for text in ("nan", "NaN", "nanj", "nan+1j", "1+nanj", "inf", "-infj", "1e999"):
        assert task.score(task.train[0], f"<answer>{text}</answer>").reward == 0


def test_an_unknown_dataset_gets_near_names():
    with pytest.raises(ValueError, match=r"reasoning-gym has no dataset 'mini_soduku'; did you mean mini_sudoku"):
        load_task("reasoning-gym:mini_soduku")
    with pytest.raises(ValueError, match="cannot be made: AssertionError: Must specify at least one dataset"):
        load_task("reasoning-gym:composite")
    with pytest.raises(ValueError, match="its scorer takes nonsense for a right answer"):
        load_task("reasoning-gym:game_of_life_halting")


def test_slow_questions_are_given_up(monkeypatch):
    monkeypatch.setattr("es_finetune.tasks.reasoning.GENERATION_SECONDS", 0.01)
    with pytest.raises(ValueError, match="its questions cannot be made: no result within 0.01 s"):
        load_task("reasoning-gym:futoshiki")


# --- loading ---------------------------------------------------------------------------------------------------------


def test_an_unknown_task_is_named():
    with pytest.raises(
        ValueError,
        match="unknown task 'sudoku'; choose one of: countdown, countdown-char, conciseness, math, reasoning-gym:<name>, custom",
    ):
        load_task("sudoku")


@pytest.mark.parametrize("name", ["countdown", "countdown-char", "conciseness"])
def test_every_task_is_disjoint_and_says_so_if_not(name):
    task = load_task(name)
    assert not {item.key for item in task.train} & {item.key for item in task.test}
    task.test = [*task.test, task.train[0]]
    with pytest.raises(ValueError, match=r"1 question\(s\) are both in train and in test"):
        check_disjoint(task)


def test_tasks_of_packages_are_disjoint(mathematics, sudoku):
    for task in (mathematics, sudoku):
        assert not {item.key for item in task.train} & {item.key for item in task.test}
        task = type("Task", (), {"name": task.name, "train": task.train, "test": [*task.test, task.train[0]]})
        with pytest.raises(ValueError, match=r"1 question\(s\) are both in train and in test"):
            check_disjoint(task)


def test_countdown_takes_the_seed():
    assert load_task("countdown", seed=1).train[0] not in Countdown().train


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
        "import sys\nfrom es_finetune.tasks import load_task\nload_task('countdown'); load_task('conciseness')\n"
        "load_task('custom', data=[{'prompt': str(i)} for i in range(9)], reward=lambda c, i: 0)\n"
        "print(sorted({'datasets', 'math_verify', 'sympy', 'reasoning_gym', 'transformers'} & set(sys.modules) - "
        "{'sympy'}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
