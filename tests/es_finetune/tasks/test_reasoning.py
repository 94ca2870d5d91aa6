"""Contract under test: the tasks reasoning-gym:<name> (es_finetune.tasks.reasoning).

- The questions are the same every time, others with another seed, and train and test share none.
- The reward is the dataset's own score of the last answer block, and a number that is none is not the right number.
- Hostile text gets no credit and costs next to nothing here. What takes long is killed, and no answer is run as code.
- A dataset that cannot be had is one sentence, with near names.
"""

import base64
import itertools
import pickle
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from es_finetune.errors import UserError
from es_finetune.tasks import check_disjoint, load_task, reasoning
from es_finetune.tasks.reward_process import RewardProcess

from .conftest import TEXTS


@pytest.fixture(scope="session")
def gym():
    """The process that makes questions and scores answers: one for all tests, for reasoning-gym takes 3 s to import."""
    process = RewardProcess(f"{Path(reasoning.__file__).with_name('graders') / 'reasoning.py'}:serve", 60.0)
    yield process
    process.close()


@pytest.fixture
def load(gym, monkeypatch):
    """load(name, questions=(4, 8), **options): the task, by the shared process. So few questions take a few
    milliseconds where 700 take up to 19 s; None leaves their number alone."""

    class Shared:
        def __init__(self, target, seconds):
            assert target == gym.target
            self.seconds = seconds

        def __call__(self, *arguments):
            gym.seconds = self.seconds
            return gym(*arguments)

    def load(name, questions=(4, 8), **options):
        with monkeypatch.context() as patch:
            patch.setattr(reasoning, "RewardProcess", Shared)
            if questions:
                patch.setattr(reasoning, "TRAIN", questions[0])
                patch.setattr(reasoning, "TEST", questions[1])
            return load_task(f"reasoning-gym:{name}", **options)

    return load


def entry_of(item):
    return pickle.loads(base64.b64decode(item.data["entry"]))


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
                clue in (0, cell)
                for row, line in zip(rows, cells, strict=True)
                for clue, cell in zip(row, line, strict=True)
            )
            and all(len(set(column)) == 4 for column in zip(*cells, strict=True))
            and all(
                len({cells[i][j], cells[i][j + 1], cells[i + 1][j], cells[i + 1][j + 1]}) == 4
                for i in (0, 2)
                for j in (0, 2)
            )
        ):
            return "\n".join(" ".join(map(str, line)) for line in cells)


def test_sudoku(load):
    sudoku = load("mini_sudoku", questions=None)
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
    check_disjoint(sudoku)
    sudoku.test = [*sudoku.test, sudoku.train[0]]
    with pytest.raises(UserError, match=r"1 question\(s\) are both in train and in test"):
        check_disjoint(sudoku)


def test_questions_are_the_same_every_time_and_others_with_another_seed(load):
    sudoku, again, other = load("mini_sudoku"), load("mini_sudoku"), load("mini_sudoku", seed=1)
    assert again.train == sudoku.train and again.test == sudoku.test
    assert not {item.key for item in other.train} & {item.key for item in [*sudoku.train, *sudoku.test]}


def test_arc(load):
    task = load("arc_agi")
    assert len(task.train) == 4 and len(task.test) == 8
    score = task.score(task.train[0], "<answer>1 2\n3 4</answer>")
    assert 0 <= score.reward < 0.1 and score[1:] == (0.0, 1.0, None)


def test_few_questions_are_cut_in_proportion(load):
    task = load("coin_flip", questions=None)
    total = len(task.train) + len(task.test)
    assert total < 700 and len(task.train) == total * 2 // 7
    assert task.notes == [f"reasoning-gym:coin_flip has no more than {total} different questions"]


@pytest.mark.parametrize("frame", ["{}", "<answer>{}</answer>", "<answer>{}"])
def test_sudoku_gives_hostile_answers_nothing(load, hostile, frame, within):
    sudoku = load("mini_sudoku")
    with within(5):
        score = sudoku.score(sudoku.train[0], frame.format(hostile))
    # The dataset's score gives 0.1 for the share of cells that happen to be right.
    assert score.exact == 0 and score.reward < 0.1 and score.format == ("</answer>" in frame)


@pytest.mark.parametrize("name", ["mini_sudoku", "spiral_matrix", "complex_arithmetic"])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
def test_any_text_has_a_score(load, is_a_score, within, name, text):
    task = load(name, time_limit=0.5)
    with within(5):
        score = task.score(task.train[0], f"<answer>{text}</answer>")
    assert is_a_score(score) and (score.error is None or score.reward == 0)


@pytest.mark.parametrize(
    "name, good, reward",
    [
        ("spiral_matrix", "[{}]", 0.1),
        ("polynomial_multiplication", "({})*1", 1),
        ("simple_integration", "{} + C - C", 1),
    ],
)
def test_no_grader_runs_an_answer(load, name, good, reward, evil):
    """Nor does it lose what needs a scorer's own reading: a list is part of the credit, another form of a formula all
    of it."""
    task = load(name)
    for text in evil:
        assert task.score(task.train[0], f"<answer>{text}</answer>").reward == 0
    answer = entry_of(task.train[0])["answer"]
    if name == "spiral_matrix":
        answer = ", ".join(answer.split())
    assert task.score(task.train[0], f"<answer>{good.format(answer)}</answer>") == (reward, reward == 1, 1.0, None)


def test_an_answer_that_repeats_the_question_is_none(load):
    task = load("simple_integration")
    metadata = entry_of(task.train[0])["metadata"]
    answer = f"Integral({metadata['integrand']}, {metadata['variable']})"
    assert task.score(task.train[0], f"<answer>{answer}</answer>").reward == 0


def test_no_number_is_not_the_right_number(load):
    task = load("complex_arithmetic")
    for text in ("nan", "NaN", "nanj", "nan+1j", "1+nanj", "inf", "-infj", "1e999"):
        assert task.score(task.train[0], f"<answer>{text}</answer>").reward == 0


def test_an_unknown_dataset_gets_near_names(load):
    with pytest.raises(UserError, match=r"reasoning-gym has no dataset 'mini_soduku'; did you mean mini_sudoku"):
        load("mini_soduku")


@pytest.mark.parametrize(
    "name, problem",
    [
        ("composite", "cannot be made: AssertionError: Must specify at least one dataset"),
        ("game_of_life_halting", "its scorer takes nonsense for a right answer"),
    ],
)
def test_a_dataset_that_cannot_serve_is_refused(load, name, problem):
    with pytest.raises(UserError, match=problem):
        load(name)


def test_slow_questions_are_given_up(tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text("import time\ndef serve(text, item):\n    time.sleep(60)\n")
    slow = f"{tmp_path / 'slow.py'}:serve"
    monkeypatch.setattr(reasoning, "RewardProcess", lambda target, seconds: RewardProcess(slow, seconds))
    monkeypatch.setattr(reasoning, "GENERATION_SECONDS", 0.01)
    with pytest.raises(UserError, match="its questions cannot be made: no result within 0.01 s"):
        load_task("reasoning-gym:futoshiki")


def test_a_scorer_that_evaluates_is_killed(load, within):
    task = load("binary_matrix", time_limit=0.5)
    for text, problem in (
        ("(" * 10_000, None),
        ("__import__('os')._exit(0)", None),
        ("9**9**9**9", "no result within 0.5 s, killed"),
    ):
        with within(5):
            score = task.score(task.train[0], f"<answer>{text}</answer>")
        assert score[:3] == (0.0, 0.0, 1.0) and (problem is None or problem in score.error)
