"""Contract: bench/learning/learning.py compares each option with its reference seed by seed, runs what an option says,
and with --options takes the other runs from the file."""

import json

import pytest

from bench import RESULTS
from bench.learning import learning
from es_finetune import TrainConfig


def made_up(seeds):
    return [
        {"option": name, "seed": seed, "final": 0.5 + seed / 10 + place * (seed + 1) / 1000}
        for seed in range(seeds)
        for place, name in enumerate(learning.OPTIONS)
    ]


def test_differences_are_paired_by_seed():
    rows = {row["option"]: row for row in learning.table(made_up(3))}
    place = list(learning.OPTIONS).index("noise of rank 1")
    row = rows["noise of rank 1"]
    assert row["reference"] == "z-scores" and row["final"] == pytest.approx(0.6 + place * 0.002)
    assert row["difference"] == pytest.approx(place * 0.002)
    assert row["difference_error"] == pytest.approx(place * 0.001 / 3**0.5)  # small beside that of the seeds
    assert row["error"] > 0.05


def test_every_option_is_one_of_a_run():
    for options in learning.OPTIONS.values():
        TrainConfig(task="countdown-char", **options)
    ranks = {name: options["noise_rank"] for name, options in learning.OPTIONS.items() if "noise_rank" in options}
    assert ranks == {"noise of rank 1": 1, "noise of rank 4": 4, "rank 1, members in one batch": 1}


def test_runs_of_other_options_are_kept(tmp_path):
    path = tmp_path / "learning.json"
    path.write_text(json.dumps({"runs": made_up(3)}))
    assert learning.kept(path, ["z-scores"], 2) == [run for run in made_up(2) if run["option"] == "z-scores"]
    assert learning.kept(tmp_path / "nothing", [], 2) == []
    with pytest.raises(SystemExit, match="no run of z-scores, seed 3: run it too"):
        learning.kept(path, ["z-scores"], 4)
    assert len(learning.kept(RESULTS / "learning.json", ["z-scores", "bf16, master none"], 6)) == 12
