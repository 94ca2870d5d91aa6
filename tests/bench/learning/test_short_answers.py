"""Contract: bench/learning/short_answers.py counts, kind by kind, the answers that are the reference and those that
hold it, from what a run leaves; and a run that is there is not made again."""

import json

import pytest

from bench.learning import seeds, short_answers
from es_finetune.tasks.short_answers import ShortAnswers


@pytest.fixture
def work(tmp_path):
    """A run's folder: all base answers hold the reference, and all tuned ones to sums are it."""
    run = tmp_path / "0"
    (run / "answers").mkdir(parents=True)
    for when in short_answers.WHEN:
        lines = []
        for item in ShortAnswers().test:
            right = "+" in item.key and when == "tuned"
            text = item.data if right else f"It is {item.data}." if when == "base" else "No idea"
            lines.append(json.dumps({"prompt": item.prompt, "completion": text}) + "\n")
        (run / "answers" / f"{when}.jsonl").write_text("".join(lines))
    summary = {"seed": 0, "base": 0.0, "final": 10 / 70, "seconds_total": 600.0, "live": "0" * 16}
    (run / "summary.json").write_text(json.dumps(summary))
    row = {"generation": 0, "exact": 0.0, "reward": -21.0, "format": 0.0}
    (run / "evals.jsonl").write_text("".join(json.dumps(row | {"generation": n}) + "\n" for n in (0, 30)))
    (run / "metrics.jsonl").write_text(30 * (json.dumps({"seconds": 20.0}) + "\n"))
    (run / "resources.json").write_text(json.dumps({"cpu_seconds": 500.0, "peak_memory_bytes": 10**9}))
    return tmp_path


def test_answers_are_counted_by_kind(work, monkeypatch, capsys):
    monkeypatch.setattr(seeds.smollm2, "fetch", lambda: None)
    monkeypatch.setattr(seeds, "train", None)
    flags = ["--seeds", "1", "--device", "cpu", "--work", str(work), "--out", str(work / "results")]
    monkeypatch.setattr("sys.argv", ["short_answers", *flags])
    short_answers.main()
    assert "seed 0: 0.0% -> 14.3%" in capsys.readouterr().out
    [run] = json.loads((work / "results/short_answers-cpu.json").read_text())["runs"]
    rows = {row["kind"]: row for row in run["kinds"]}
    assert sum(row["questions"] for row in rows.values()) == 70 and not rows["What color is {}?"]["trained"]
    for kind, row in rows.items():
        right = 10 if kind == "What is {}?" else 0
        assert (row["base exact"], row["base holds"]) == (0, row["questions"])
        assert (row["tuned exact"], row["tuned holds"]) == (right, right)
    assert [row[:3] for row in run["curve"]] == [[0, 0, 0.0], [600.0, 30, 0.0]]
    assert run["examples"][0] == ["What is the capital of Norway?", "It is Oslo.", "No idea"]
