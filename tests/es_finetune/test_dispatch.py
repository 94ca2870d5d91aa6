"""Contract under test: whatever is late, lost or repeated, every member is counted once, or dropped where that was asked for.

The first result counts. A member goes out again only when its worker is gone, or when it is late and a worker has nothing else to do.
"""

import random

import pytest
from es_finetune.workers.dispatch import Dispatch


def test_members_go_out_in_order_each_to_one_worker():
    d = Dispatch([3, 4, 5])
    assert [d.next(w, 0.0) for w in "abcd"] == [3, 4, 5, None]
    assert d.overdue() is None and not d.finished
    assert all(d.done(w, m) for w, m in zip("abc", (3, 4, 5))) and d.finished and d.next("a", 1e9) is None


def test_a_late_member_goes_out_again_and_the_first_result_counts():
    d = Dispatch([0, 1], limit=10.0)
    assert (d.next("a", 0.0), d.next("b", 1.0)) == (0, 1)
    assert d.done("b", 1) and d.next("b", 10.0) is None and d.overdue() == 10.0
    assert d.next("b", 10.1) == 0 and d.next("c", 10.2) is None  # not a third time, before that one is late too
    assert d.next("c", 20.2) == 0
    assert d.done("c", 0) and d.finished and not d.done("a", 0) and not d.done("b", 0)


def test_what_a_lost_worker_had_goes_out_first():
    d = Dispatch(range(4))
    assert (d.next("a", 0.0), d.next("b", 0.0)) == (0, 1)
    d.lost("a")
    assert [d.next("b2", 1.0), d.next("c", 1.0)] == [0, 2]
    assert not d.dropped


def test_a_lost_copy_does_not_go_out_while_another_is():
    d = Dispatch([0], limit=1.0)
    d.next("a", 0.0)
    assert d.next("b", 2.0) == 0
    d.lost("a")
    assert d.next("c", 2.5) is None
    d.lost("b")
    assert d.next("c", 2.6) == 0


def test_dropped_members_are_named_and_their_results_do_not_count():
    d = Dispatch(range(3), limit=5.0, drop=True)
    for worker, member in zip("abc", range(3)):
        assert d.next(worker, float(member)) == member
    assert d.done("b", 1) and d.next("b", 9.0) is None and d.give_up(5.0) == []
    assert d.give_up(5.5) == [0] and d.give_up(5.5) == [] and d.overdue() == 7.0
    assert not d.done("a", 0) and d.done("c", 2) and d.finished and d.dropped == [0]


def test_without_drop_nothing_is_given_up():
    d = Dispatch([0], limit=1.0)
    d.next("a", 0.0)
    assert d.give_up(99.0) == [] and not d.finished


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("seed", range(30))
def test_in_any_order_of_events_each_member_counts_once(seed, drop):
    draws, members, workers = random.Random(seed), 12, list("abcd")
    d, now, counted, at = Dispatch(range(members), limit=3.0, drop=drop), 0.0, [], {}
    for _ in range(10_000):
        if d.finished:
            break
        now += draws.random()
        d.give_up(now)
        worker = draws.choice(workers)
        event = draws.random()
        if worker not in at:
            if (member := d.next(worker, now)) is not None:
                at[worker] = member
        elif event < 0.3:
            d.lost(worker)
            del at[worker]
        elif event < 0.7:
            member = at.pop(worker)
            if d.done(worker, member):
                counted.append(member)
    assert d.finished and sorted(counted + d.dropped) == list(range(members))
    assert drop or not d.dropped
