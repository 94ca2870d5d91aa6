"""Contract: bytes are of what a run really sends, and are those of a small case counted by hand; times and memory are
values times unit costs. The simulation is list scheduling where nothing happens; whatever happens, every member of
every generation counts once or is dropped where that was asked for; waves are never faster than a shared counter with
the same members; a seed decides everything, and what is published is what the script computes."""

import contextlib
import heapq
import json
import math
import pickle
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.speed import scale

QUIET = {"spread": 0.0, "stragglers": 0.0, "hours_between_failures": 0.0, "generations": 3}
REPORT = json.loads((scale.RESULTS / "scale.json").read_text())


def test_a_line_is_its_rewards_its_keys_and_its_text():
    line = scale.line()
    # 9 bytes a double with its mark; strings with 2 bytes before and 1 after; what is left are the marks of a list and
    # a dict, and 9 values.
    told = scale.QUESTIONS * 9 + sum(len(key) + 3 for key in line) + len(line["digest"]) + 3
    assert told < len(pickle.dumps(line)) < told + 90
    assert (
        len(line["rewards"]) == scale.QUESTIONS and line["tokens"] == scale.QUESTIONS * 1024 and line["error"] is None
    )


def test_bytes_on_the_wire_are_those_of_all_lines_and_of_one_update():
    one = len(pickle.dumps(scale.line()))
    for workers, n in ((8, 32), (64, 256)):
        row = scale.wire(workers, 4)
        assert row["population"] == n and row["ray_driver_receives"] == n * one
        # Of the others' lines; in one pickle the keys stand once, and each line after the first has 2 bytes for each of
        # them.
        keys = sum(len(key) + 3 - 2 for key in scale.line())
        assert row["torchrun_rank_receives"] == pytest.approx((workers - 1) * (4 * one - 3 * keys), rel=0.01)
    few, many = (scale.wire(n, 1)["ray_worker_receives"] for n in (40, 1040))
    assert many - few == pytest.approx(9 * 1000, rel=0.01)
    assert scale.wire(8, 1)["population"] == 30 and scale.wire(1, 4)["torchrun_rank_receives"] == 0


def test_update_and_memory_are_values_times_unit_costs():
    row, costs = scale.on_paper("Qwen2.5-7B"), scale.unit_costs()
    assert row["parameters"] == 7_615_616_512
    assert row["memory_bytes"] == {"fp32": 6 * 7_615_616_512, "copy": 4 * 7_615_616_512, "none": 2 * 7_615_616_512}
    assert row["update_seconds_cpu"][256] == pytest.approx(7_615_616_512 * 256 * costs["cpu"])
    assert row["update_seconds_h200_predicted"][8][256] == pytest.approx(7_615_616_512 * 32 * costs["h200_predicted"])
    assert row["weights_seconds"] == pytest.approx(2 * 7_615_616_512 / scale.LINK)
    even = REPORT["members_whose_update_takes_as_long_as_the_link"]
    assert even * 7_615_616_512 * costs["h200_predicted"] == pytest.approx(row["weights_seconds"])


@pytest.mark.parametrize("policy", scale.POLICIES)
def test_without_noise_a_generation_is_its_rounds_and_an_update(policy):
    row = scale.simulate(policy, 4, 10, 7.0, **QUIET)
    assert row["wall"] == pytest.approx(3 * (3 * 60.0 + 7.0))  # ten members on four workers: three rounds
    assert row["efficiency"] == pytest.approx(10 * 60 / (4 * 187.0))
    assert not any(row[key] for key in ("wasted", "dropped", "repeated", "deaths"))


def test_a_shared_counter_is_list_scheduling_and_waves_are_their_slowest():
    workers, members, changed = 5, 33, {"hours_between_failures": 0.0, "stragglers": 0.1, "generations": 4}
    s, draws, listed, waves = scale.SIMULATED | changed, random.Random(f"3 {workers} {members}"), 0.0, 0.0
    for _ in range(4):
        times = [seconds * (s["straggle"] if straggles else 1) for seconds, straggles in scale.drawn(draws, members, s)]
        free = [0.0] * workers
        for seconds in times:
            heapq.heapreplace(free, free[0] + seconds)
        listed += max(free)
        waves += sum(max(times[start : start + workers]) for start in range(0, members, workers))
    assert scale.simulate("shared counter", workers, members, 0.0, 3, **changed)["wall"] == pytest.approx(listed)
    assert scale.simulate("waves", workers, members, 0.0, 3, **changed)["wall"] == pytest.approx(waves)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.floats(0, 1), st.floats(0, 0.5), st.integers(0, 99))
def test_waves_are_never_faster_than_a_shared_counter(workers, members, spread, stragglers, seed):
    changed = {"spread": spread, "stragglers": stragglers, "hours_between_failures": 0.0, "generations": 3}
    waves, counter = (
        scale.simulate(policy, workers, members, 1.0, seed, **changed) for policy in ("waves", "shared counter")
    )
    assert waves["wall"] >= counter["wall"] * (1 - 1e-9) and waves["efficiency"] <= counter["efficiency"] * (1 + 1e-9)


@contextlib.contextmanager
def counting(monkeypatch):
    """What each generation's Dispatch was told: [(members that counted, dispatch)]."""
    told, make = [], scale.handing_out

    def watched(*asked):
        dispatch, counted = make(*asked), []
        done = dispatch.done
        dispatch.done = lambda member: done(member) and (counted.append(member) or True)
        told.append((counted, dispatch))
        return dispatch

    with monkeypatch.context() as patch:
        patch.setattr(scale, "handing_out", watched)
        yield told


@pytest.mark.parametrize("policy", scale.POLICIES)
def test_whatever_happens_every_member_counts_once_or_is_dropped(policy, monkeypatch):
    rough = {"hours_between_failures": 0.3, "stragglers": 0.1, "generations": 20}
    with counting(monkeypatch) as told:
        row = scale.simulate(policy, 8, 32, 2.0, **rough)
    assert len(told) == 20 and all(sorted(counted + dispatch.dropped) == list(range(32)) for counted, dispatch in told)
    assert row["dropped"] == sum(len(dispatch.dropped) for _, dispatch in told) and bool(row["dropped"]) == (
        policy == "dropped"
    )
    assert row["deaths"] > 20 and row["repeated"] > 0 and 0 < row["wasted"] < 1 - row["efficiency"] < 1
    # The usual time of those that counted, told from outside.
    draws, s, useful = random.Random("0 8 32"), scale.SIMULATED | rough, 0.0
    for counted, _ in told:
        times = scale.drawn(draws, 32, s)
        useful += sum(times[member][0] for member in counted)
    assert row["efficiency"] * 8 * row["wall"] == pytest.approx(useful)
    assert row == scale.simulate(policy, 8, 32, 2.0, **rough) != scale.simulate(policy, 8, 32, 2.0, 1, **rough)


def test_what_a_death_costs_one_worker_can_be_told_by_hand(monkeypatch):
    """One worker, four members of 60 s and an update of 10 s a generation; it dies once, 95 s into the third: 35 s into
    its second member there."""
    monkeypatch.setattr(scale.random.Random, "expovariate", lambda self, rate: next(moments))
    for every, updates in ((0, 2), (2, 0)):
        moments = iter([2 * 250.0 + 95.0, math.inf])
        changed = {**QUIET, "generations": 4, "hours_between_failures": 1.0, "snapshot_every": every}
        row = scale.simulate("shared counter", 1, 4, 10.0, **changed)
        assert row["deaths"] == row["repeated"] == 1
        assert row["wall"] == pytest.approx(4 * 250 + 35 + 120 + updates * 10) and row["wasted"] * row[
            "wall"
        ] == pytest.approx(35)


def test_a_late_members_second_copy_counts_and_the_first_is_wasted():
    """Every member straggles where it goes out first: 300 s. Two workers, one member: given to the second after 180 s,
    done 60 s later; the first works on until 300 s, and makes up for the update after that."""
    changed = {**QUIET, "stragglers": 1.0, "generations": 1}
    row = scale.simulate("re-issued", 2, 1, 5.0, **changed)
    assert (
        row["wall"] == pytest.approx(245.0)
        and row["repeated"] == 1
        and row["efficiency"] == pytest.approx(60 / (2 * 245))
    )
    dropped = scale.simulate("dropped", 2, 1, 5.0, **changed)
    assert dropped["wall"] == pytest.approx(185.0) and dropped["dropped"] == 1 and dropped["efficiency"] == 0
    # In the second generation the first worker is still at its member of the first, until 300, and at the update until
    # 305; the second's copy is late at 245 + 180 = 425, goes to the first, is done at 485.
    row = scale.simulate("re-issued", 2, 1, 5.0, **changed | {"generations": 2})
    assert row["wall"] == pytest.approx(490.0) and row["wasted"] * 2 * 490 == pytest.approx(300)


def test_what_is_published_is_what_the_script_computes():
    assert REPORT["unit_costs"] == scale.unit_costs() and REPORT["line_bytes"] == len(pickle.dumps(scale.line()))
    assert REPORT["paper"] == json.loads(json.dumps([scale.on_paper(model) for model in scale.MODELS]))
    assert scale.wire(64, 1) in REPORT["wire"] and scale.wire(8, 4) in REPORT["wire"]
    assert [(r["workers"], r["policy"]) for r in REPORT["simulated"]] == [
        (w, p) for w in scale.WORKERS if w > 1 for p in scale.POLICIES
    ]
    for row in REPORT["simulated"][: len(scale.POLICIES)]:
        assert scale.simulated(row["policy"], row["workers"]) == pytest.approx(row)
