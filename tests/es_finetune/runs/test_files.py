"""Contract under test: the files of a run beside its log.

One that is written whole is whole or as it was before. One that grows by rows is read up to a torn last one.
"""

import errno
import json
import os

import pytest

from es_finetune.engines import Answer
from es_finetune.runs.files import append_row, generation_rows, read_rows, replacing, save_answers, write_atomically
from es_finetune.tasks import Item, Score


def test_a_file_is_whole_or_as_before(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_atomically(path, "before")

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: .*summary.json'"):
        write_atomically(path, "after")
    with pytest.raises(KeyboardInterrupt), replacing(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(OSError, match="^the image cannot be encoded$"), replacing(path):
        raise OSError("the image cannot be encoded")
    assert path.read_text() == "before" and [file.name for file in tmp_path.iterdir()] == ["summary.json"]


def test_rows_are_read_up_to_a_torn_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_rows(path) == []
    for number in range(3):
        append_row(path, {"generation": number, "text": "\u2028"})
    path.write_bytes(path.read_bytes()[:-5])
    assert [row["generation"] for row in read_rows(path)] == [0, 1]


def test_a_row_that_does_not_say_of_which_generation_it_is_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for row in ({"generation": 0}, {"generation": None}, {"generation": 2}):
        append_row(path, row)
    with pytest.raises(
        ValueError,
        match="metrics.jsonl is damaged in row 2: it does not say of which generation it is; remove that row",
    ):
        generation_rows(path)


def test_saved_answers_can_be_read_back(tmp_path):
    chat = ({"role": "user", "content": "3 + 5?\n"},)
    items = [Item("a\u2028", 0), Item(chat, 1)]
    path = tmp_path / "base.jsonl"
    path.write_text("of an earlier eval")
    save_answers(
        path, items, [Answer("x\ny\ud800", (1,)), Answer("8", (2,))], [Score(0.5, 1.0), Score(None, error="broke")]
    )
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"prompt": "a\u2028", "completion": "x\ny\ud800", "reward": 0.5, "exact": 1.0},
        {"prompt": list(chat), "completion": "8", "reward": None, "exact": None, "error": "broke"},
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["base.jsonl"]
    with pytest.raises(ValueError):
        save_answers(path, items, [Answer("x", (1,))], [Score(0.5), Score(0.5)])
