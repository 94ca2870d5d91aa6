"""Contract: bench/learning/conciseness.py gives every run its seconds and no generation after them, and writes clock,
reward and tokens of each generation. On the embedded model, which needs no download."""

import json
import sys

import pytest

from bench.learning import conciseness
from es_finetune import TrainConfig


@pytest.fixture
def embedded(monkeypatch):
    def config(**options):
        return TrainConfig(**options | {"model": "embedded", "task": "countdown-char", "prompts": 2, "eval_items": 2})

    monkeypatch.setattr(conciseness, "TrainConfig", config)
    monkeypatch.setattr(conciseness, "POPULATION", 4)


@pytest.mark.parametrize("way", conciseness.WAYS)
def test_a_run_ends_with_the_generation_that_passes_its_time(embedded, way):
    row = conciseness.run(way, 1, "anything", 0.2)
    until = [generation["until"] for generation in row["generations"]]
    assert until == sorted(until) and until[-1] > 0.2 and all(u <= 0.2 for u in until[:-1])
    assert all(g["reward"] <= g["best"] and g["tokens"] > 0 for g in row["generations"])
    assert {"way": way, "seed": 1}.items() <= row.items() and 0 <= row["base"] <= 1 and 0 <= row["final"] <= 1


class Here:
    """A pool whose jobs run when they are asked for."""

    def __init__(self, processes, mp_context):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, run, *arguments):
        future = conciseness.concurrent.futures.Future()
        future.set_result(run(*arguments))
        return future


def test_the_file_has_every_way_and_seed(embedded, monkeypatch, tmp_path):
    monkeypatch.setattr(conciseness.concurrent.futures, "ProcessPoolExecutor", Here)
    command = ["conciseness.py", "some/model", "--seconds", "0", "--seeds", "2", "--json", str(tmp_path / "found.json")]
    monkeypatch.setattr(sys, "argv", command)
    conciseness.main()
    content = json.loads((tmp_path / "found.json").read_text())
    assert content["model"] == "model" and content["setting"]["seconds"] == 0
    assert [(r["way"], r["seed"]) for r in content["runs"]] == [(w, s) for s in range(2) for w in conciseness.WAYS]
    assert all(len(r["generations"]) == 1 for r in content["runs"])
