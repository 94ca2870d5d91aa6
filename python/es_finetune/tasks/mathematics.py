r"""Competition mathematics with a \boxed{} answer, graded by math-verify: MATH and the usual test sets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from es_finetune.errors import UserError, require
from es_finetune.tasks import Data, Item, Score
from es_finetune.tasks.extract import last_boxed
from es_finetune.tasks.reward_process import RewardError, RewardProcess

TRAIN = "DigitalLearningGmbH/MATH-lighteval"
TEST = "HuggingFaceH4/MATH-500"
# What Qwen's math models were trained with
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
MAX_NESTING = 20  # brackets in an answer; a thousand keep a LaTeX parser busy for seconds

_EASY = re.compile(r"(Level )?[12?]")
_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


class Mathematics:
    """`data` and `test_data`: the name of a hub dataset, a .json, .jsonl or .parquet file, a folder of such files or
    one written by `save_to_disk`, or rows as dicts. Of the splits of `data`, "train" is taken, of `test_data` "test",
    else the only one there is.

    Columns: "problem" or "question"; "answer" or "final_answer", else the last \\boxed{} of "solution". A "level" of 1
    or 2 in the training data is left out, as is a row without an answer, a problem asked twice, and a training problem
    that is in the test data; `notes` counts them. Problems are compared with white space normalised.
    """

    name = "math"
    max_new_tokens = 3000
    metric = "exact"
    floor = 0.0
    eval_samples = 1

    def __init__(self, data: Data | None, test_data: Data | None, seconds: float):
        require(f"the task {self.name!r}", "tasks", "math_verify")
        self.notes: list[str] = []
        self.test = self._items(TEST if test_data is None else test_data, "test", set())
        self.train = self._items(TRAIN if data is None else data, "train", {item.key for item in self.test})
        self._grade = RewardProcess(f"{Path(__file__).with_name('graders') / 'mathematics.py'}:grade", seconds)

    def _items(self, source: Data, split: str, elsewhere: set[str]) -> list[Item]:
        rows, name = _rows(source, split)
        items: dict[str, Item] = {}
        easy = unanswered = again = shared = 0
        for number, row in enumerate(rows, 1):
            columns = (
                [column for column in ("problem", "question") if row.get(column)] if isinstance(row, Mapping) else []
            )
            problem = row[columns[0]] if columns else None
            if not isinstance(problem, str):
                raise UserError(
                    f"{name}, row {number}: no problem; math reads the columns problem (or question) and answer (or "
                    "solution)"
                )
            key = " ".join(problem.split())
            gold = _gold(row)
            if split == "train" and _EASY.fullmatch(str(row.get("level", ""))):
                easy += 1
            elif gold is None:
                unanswered += 1
            elif key in elsewhere:
                shared += 1
            elif key in items:
                again += 1
            else:
                messages = ({"role": "system", "content": SYSTEM}, {"role": "user", "content": problem})
                items[key] = Item(messages, key, {"gold": gold}, f"{name}, row {number}")
        for count, why in (
            (easy, "not of levels 3 to 5"),
            (unanswered, "without an answer"),
            (again, "asked twice"),
            (shared, "also in the test data"),
        ):
            if count:
                self.notes.append(f"{name}: {count} of {number} rows left out, {why}")
        if not items:
            reasons = "; ".join(note for note in self.notes if note.startswith(name))
            raise UserError(f"{name}: no problem to {split} on" + (f" ({reasons})" if reasons else ", it is empty"))
        return list(items.values())

    def score(self, item: Item, completion: str) -> Score:
        r"""reward = exact: 1 if the last \boxed{} of the completion equals the answer, else 0. format: 1 if there is
        one.

        Only the inside of that box, at most 1,000 characters, is parsed, in a process that is killed at the time limit;
        an answer that cannot be graded is wrong, and `error` says why it could not.
        """
        answer = last_boxed(completion)
        if answer is None:
            return Score(0.0, 0.0, 0.0)
        gold = item.data["gold"]
        if answer == gold:
            return Score(1.0, 1.0, 1.0)
        if _nesting(answer) > MAX_NESTING:
            return Score(0.0, 0.0, 1.0)
        try:
            exact = float(self._grade(answer, item.data) == 1.0)
        except RewardError as error:
            return Score(0.0, 0.0, 1.0, f"math-verify: {error}; answer {answer[:60]!a}")
        return Score(exact, exact, 1.0)


def _gold(row: Mapping[str, Any]) -> str | None:
    """The right answer in a row, as text: a number, a text, or a list of those (OlympiadBench)."""
    for column in ("answer", "final_answer"):
        value = row.get(column)
        parts = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        text = ", ".join(str(part).strip() for part in parts).strip()
        if text:
            # An answer may itself be a whole box, or a solution that ends with one.
            return last_boxed(text) or (text[1:-1].strip() if len(text) > 2 and text[0] == text[-1] == "$" else text)
    solution = row.get("solution")
    return last_boxed(solution) if isinstance(solution, str) else None


def _nesting(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _rows(source: Data, split: str) -> tuple[Any, str]:
    """Rows, and what to call them in a message."""
    if not isinstance(source, (str, Path)):
        return source, f"the {split} data"
    require("the task 'math'", "tasks", "datasets")
    import datasets

    path = Path(source)
    try:
        if path.suffix in _FORMATS:
            if not path.is_file():
                raise UserError("there is no such file")
            # Streaming reads the file itself and leaves no copy of it in a cache.
            loaded = datasets.load_dataset(_FORMATS[path.suffix], data_files=str(path), split="train", streaming=True)
        elif path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(str(source), streaming=path.is_dir())
        if not isinstance(loaded, dict):
            return list(loaded), str(source)
        chosen = split if split in loaded else next(iter(loaded)) if len(loaded) == 1 else None
        if chosen is not None:
            return list(loaded[chosen]), str(source)  # a stream is read only here
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise UserError(f"{split} data {str(source)!r} cannot be loaded: {text}") from None
    raise UserError(f"{split} data {str(source)!r} has the splits {', '.join(loaded)}, and none is called {split}")
