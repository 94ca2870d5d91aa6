"""Contract: bench/learning/countdown_smollm2.py counts how far the answers come that a run leaves; and a run that is
there is not made again."""

import json

import pytest

from bench.learning import countdown_smollm2, seeds
from es_finetune.tasks.countdown import Countdown


def far(**counts):
    names = ("answers", "end of thoughts", "answer block", "whole form", "expression", "its numbers", "exact")
    return dict.fromkeys(names, 0) | {"answers": 1} | {name.replace("_", " "): n for name, n in counts.items()}


@pytest.mark.parametrize(
    "text, counted",
    [
        ("I do not know", far()),
        ("</think>", far(end_of_thoughts=1)),
        ("<answer>no</answer>", far(answer_block=1)),
        ("</think>\n<answer>no</answer>", far(end_of_thoughts=1, answer_block=1, whole_form=1)),
        ("<answer>1 + 2</answer>", far(answer_block=1, expression=1)),
        ("<answer>{wrong}</answer>", far(answer_block=1, expression=1, its_numbers=1)),
        ("<answer>{right}</answer> so", far(answer_block=1, expression=1, its_numbers=1, exact=1)),
    ],
    ids=str,
)
def test_answers_are_counted_by_how_far_they_come(text, counted):
    item = next(item for item in Countdown().test if item.key[0][0] + item.key[0][1] + item.key[0][2] == item.key[1])
    right = " + ".join(map(str, item.key[0]))
    wrong = " * ".join(map(str, item.key[0]))
    assert countdown_smollm2.counts({item.prompt: text.format(right=right, wrong=wrong)}) == counted


def test_a_report_has_base_and_tuned_answers_beside_each_other(tmp_path, monkeypatch, capsys):
    run, items = tmp_path / "0", Countdown().test[:5]
    (run / "answers").mkdir(parents=True)
    for when, text in (("base", "Well"), ("tuned", "</think>\n<answer>1</answer>")):
        lines = [json.dumps({"prompt": item.prompt, "completion": text}) + "\n" for item in items]
        (run / "answers" / f"{when}.jsonl").write_text("".join(lines))
    (run / "summary.json").write_text(
        json.dumps({"seed": 0, "base": 0.0, "final": 0.0, "seconds_total": 90.0, "live": "0" * 16})
    )
    row = {"seconds": 40.0, "reward_mean": 0.05, "format_mean": 0.5, "exact_mean": 0.0, "tokens": 800}
    (run / "metrics.jsonl").write_text(2 * (json.dumps(row) + "\n"))
    (run / "evals.jsonl").write_text('{"generation": 2, "exact": 0.0, "format": 1.0}\n')
    (run / "resources.json").write_text('{"cpu_seconds": 170.0, "peak_memory_bytes": 1}')
    monkeypatch.setattr(seeds.smollm2, "fetch", lambda: None)
    monkeypatch.setattr(seeds, "train", None)
    flags = ["--seeds", "1", "--work", str(tmp_path), "--json", str(tmp_path / "result.json")]
    monkeypatch.setattr("sys.argv", ["countdown_smollm2", *flags])
    countdown_smollm2.main()
    assert "seed 0, 90 s" in capsys.readouterr().out
    [kept] = json.loads((tmp_path / "result.json").read_text())["runs"]
    assert kept["curve"] == [[80.0, 2, 0.0, 1.0]] and kept["generations"] == 2 * [[40.0, 0.05, 0.5, 0.0, 800]]
    assert (kept["counts"]["base"]["whole form"], kept["counts"]["tuned"]["whole form"]) == (0, 5)
    assert kept["examples"][0] == [items[0].prompt, "Well", "</think>\n<answer>1</answer>"]
