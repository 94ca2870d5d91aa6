"""Contract: bench/learning/conciseness.py gives every run its seconds and no generation after them, writes clock,
reward and tokens of each generation, and does not make a run again that is there. On the embedded model, which needs no
download."""

import json
import sys

import pytest

from bench.learning import conciseness

HELD_OUT = {"value": -7.0, "kl": 0.5, "kl_standard_error": 0.1, "tokens": 9}
EMBEDDED = {"model": "embedded", "task": "countdown-char", "population": 4, "prompts": 2, "max_new_tokens": 12}


@pytest.fixture
def embedded(monkeypatch):
    """The embedded model's runs, and the calls of `evaluate`."""
    calls = []
    monkeypatch.setattr(conciseness, "CONFIG", conciseness.CONFIG | EMBEDDED)
    monkeypatch.setattr(conciseness, "evaluate", lambda **options: calls.append(options) or HELD_OUT)
    return calls


@pytest.mark.parametrize("way", conciseness.WAYS)
def test_a_run_ends_with_the_generation_that_passes_its_time(embedded, tmp_path, way):
    row = conciseness.run((tmp_path, way, 1, 0.2))
    until = [generation["until"] for generation in row["generations"]]
    assert until == sorted(until) and until[-1] > 0.2 and all(u <= 0.2 for u in until[:-1])
    assert all(g["reward"] <= g["best"] and g["tokens"] > 0 for g in row["generations"])
    assert {"way": way, "seed": 1, "final": -7.0, "kl": 0.5}.items() <= row.items()
    assert [call["run"] for call in embedded] == [str(tmp_path)] and embedded[0]["kl"]


class Here:
    """A pool, and its context, whose jobs run in this process."""

    def Pool(self, processes, maxtasksperchild):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    imap_unordered = staticmethod(map)


def test_the_file_has_every_way_and_seed_and_no_run_is_made_twice(embedded, monkeypatch, tmp_path):
    monkeypatch.setattr(conciseness.multiprocessing, "get_context", lambda method: Here())
    monkeypatch.setattr(conciseness.smollm2, "fetch", lambda: None)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "result.json").write_text('{"value": -200.0}')
    path = tmp_path / "found.json"
    flags = ["--seconds", "0", "--seeds", "2", "--work", str(tmp_path), "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["conciseness.py", *flags])
    conciseness.main()
    content = json.loads(path.read_text())
    assert content["model"] == "embedded" and content["base"] == -200 and content["setting"]["seconds"] == 0
    assert [(r["way"], r["seed"]) for r in content["runs"]] == [(w, s) for s in range(2) for w in conciseness.WAYS]
    assert all(len(r["generations"]) == 1 for r in content["runs"])
    conciseness.main()
    assert len(embedded) == 4 and json.loads(path.read_text())["runs"] == content["runs"]
