"""Contract: bytes are of what a run really sends, and are those of a small case counted by hand; the simulation is list scheduling where nothing happens,
loses no member whatever happens, is alike for one seed, and no policy beats the time that there is."""

import json
import math
import pathlib
import pickle
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "bench"))
import scale

QUIET = {"spread": 0.0, "stragglers": 0.0, "hours_between_failures": 0.0, "update": 0.0, "generations": 3}


def test_bytes_grow_as_what_is_sent():
    few, many = scale.update_bytes(10), scale.update_bytes(1010)
    assert many - few == pytest.approx(9 * 1000, rel=0.02)  # a double and its mark
    assert scale.QUESTIONS * 9 < scale.line_bytes() < scale.QUESTIONS * 9 + 500
    got = scale.received(8)
    assert got["torchrun"] == 32 * 7 // 8 * scale.line_bytes() and got["ray_driver"] == 32 * scale.line_bytes()
    assert len(pickle.loads(pickle.dumps(list(range(32))))) == 32 and got["ray"] == scale.update_bytes(32)


def test_update_and_memory_are_values_times_unit_costs():
    report = json.loads((scale.RESULTS / "scale.json").read_text())
    row = next(r for r in report["paper"] if (r["model"], r["workers"]) == ("Qwen2.5-7B", 8))
    assert row["parameters"] == 7_615_616_512 and row["population"] == 32 and row["memory_bytes"]["fp32"] == 6 * row["parameters"]
    assert row["update_seconds_cpu"] == pytest.approx(row["parameters"] * 32 * report["unit_costs"]["cpu"])
    assert row["weights_seconds"] == pytest.approx(row["weights_bytes"] / scale.LINK)
    assert report["unit_costs"] == scale.unit_costs() and report["line_bytes"] == scale.line_bytes()


@pytest.mark.parametrize("policy", scale.POLICIES)
def test_where_nothing_happens_it_is_list_scheduling(policy):
    found = scale.simulate(policy, 4, 10, **QUIET)
    assert found["wall"] == pytest.approx(3 * 3 * 60.0)  # ten members on four workers: three rounds
    assert found["efficiency"] == pytest.approx(10 / 12)
    assert not found["dropped"] and not found["repeated"] and not found["failures"]


def test_a_shared_counter_is_no_slower_than_waves_and_reissuing_helps_against_stragglers():
    for seed in range(5):
        waves, counter = (scale.simulate(policy, 16, 64, seed, hours_between_failures=0.0) for policy in ("waves", "shared counter"))
        assert counter["efficiency"] >= waves["efficiency"]
    options = {"stragglers": 0.1, "straggle": 20.0, "hours_between_failures": 0.0}
    waiting, again = (scale.simulate(policy, 16, 64, 0, **options) for policy in ("shared counter", "re-issued"))
    assert again["wall"] < waiting["wall"] and again["repeated"] > 0


@pytest.mark.parametrize("policy", scale.POLICIES)
def test_workers_that_die_cost_time_and_no_member(policy):
    found = scale.simulate(policy, 8, 32, 0, hours_between_failures=0.5, generations=10)
    calm = scale.simulate(policy, 8, 32, 0, hours_between_failures=0.0, generations=10)
    assert found["failures"] > 10 and found["wall"] > calm["wall"] and found["efficiency"] < calm["efficiency"] < 1
    if policy != "dropped":
        assert not found["dropped"]
    assert found == scale.simulate(policy, 8, 32, 0, hours_between_failures=0.5, generations=10)


def test_useful_time_is_that_of_the_members():
    found = scale.simulate("shared counter", 8, 32, 0, hours_between_failures=2.0, stragglers=0.0, spread=0.0, generations=10)
    assert found["efficiency"] * 8 * found["wall"] == pytest.approx(10 * 32 * 60.0)


def test_every_size_of_the_table_is_simulated():
    report = json.loads((scale.RESULTS / "scale.json").read_text())
    assert {(r["workers"], r["policy"]) for r in report["simulated"]} == {(w, p) for w in scale.WORKERS if w > 1 for p in scale.POLICIES}
    assert all(0 < r["efficiency"] < 1 and math.isfinite(r["wall"]) for r in report["simulated"])
