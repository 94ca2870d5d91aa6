"""Contract under test: whatever is late, lost or repeated, every member is counted once, or dropped where that was
asked for.

The first result counts. A member goes out again only when its worker is gone, or when it is late and a worker has
nothing else to do; `overdue` says from when on that is.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from es_finetune.workers.dispatch import Dispatch


def test_members_go_out_in_order_each_to_one_worker():
    d = Dispatch([3, 4, 5])
    assert [d.next(w, 0.0) for w in "abcd"] == [3, 4, 5, None]
    assert d.overdue() is None and not d.finished
    assert all(map(d.done, (3, 4, 5))) and d.finished and d.next("a", 1e9) is None


def test_a_late_member_goes_out_again_and_the_first_result_counts():
    d = Dispatch([0, 1], limit=10.0)
    assert (d.next("a", 0.0), d.next("b", 1.0)) == (0, 1)
    assert d.done(1) and d.next("b", 10.0) is None and d.overdue() == 10.0
    assert d.next("b", 10.1) == 0 and d.next("c", 10.2) is None  # not a third time, before that one is late too
    assert d.overdue() == 20.1 and d.next("c", 20.2) == 0
    assert d.done(0) and d.finished and not d.done(0) and d.overdue() is None


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


def test_the_member_that_went_out_last_the_longest_ago_is_the_first_to_go_out_again():
    d = Dispatch([0, 1], limit=3.0)
    assert [d.next("a", 0.0), d.next("b", 1.0), d.next("c", 3.5), d.next("d", 4.5), d.overdue()] == [0, 1, 0, 1, 6.5]
    d.lost("d")  # what is left is b's, late since 4.0
    assert d.overdue() == 4.0 and d.next("e", 5.0) == 1 and d.next("f", 5.0) is None


def test_dropped_members_are_named_and_their_results_do_not_count():
    d = Dispatch(range(3), limit=5.0, drop=True)
    for worker, member in zip("abc", range(3), strict=True):
        assert d.next(worker, float(member)) == member
    assert d.done(1) and d.next("b", 9.0) is None and d.give_up(5.0) == []
    assert d.give_up(5.5) == [0] and d.give_up(5.5) == [] and d.overdue() == 7.0
    assert not d.done(0) and d.done(2) and d.finished and d.dropped == [0]


def test_without_drop_nothing_is_given_up():
    d = Dispatch([0], limit=1.0)
    d.next("a", 0.0)
    assert d.give_up(99.0) == [] and not d.finished


def test_a_result_of_a_worker_that_was_thought_lost_counts_and_its_member_does_not_go_out_again():
    d = Dispatch([0, 1])
    d.next("a", 0.0)
    d.lost("a")
    assert d.done(0) and d.next("b", 1.0) == 1 and d.next("c", 1.0) is None
    assert d.done(1) and d.finished


class AnyOrder(RuleBasedStateMachine):
    """Workers that ask, finish, die, and whose results arrive after their death or twice, beside the plainest record of
    it: who has had what since when."""

    @initialize(members=st.integers(1, 3), limit=st.sampled_from([3.0, None]), drop=st.booleans())
    def begin(self, members, limit, drop):
        self.d, self.members, self.limit, self.drop = Dispatch(range(members), limit, drop), range(members), limit, drop
        self.now, self.has, self.old, self.counted, self.dropped = 0.0, {}, [], [], []  # has: worker -> (member, since)

    def latest(self):
        """Open members that someone has -> when they went out last."""
        times = {}
        for member, since in self.has.values():
            if member not in self.counted + self.dropped:
                times[member] = max(since, times.get(member, since))
        return times

    def late(self):
        return sorted(
            (since, member)
            for member, since in self.latest().items()
            if self.limit is not None and self.now > since + self.limit
        )

    @precondition(lambda self: len(self.has) < 3)
    @rule(seconds=st.sampled_from([0.5, 2.0, 4.0]), data=st.data())
    def ask(self, seconds, data):
        self.now += seconds
        worker = data.draw(st.sampled_from([w for w in "abc" if w not in self.has]))
        nobody_has = [m for m in self.members if m not in self.counted + self.dropped and m not in self.latest()]
        late, member = self.late(), self.d.next(worker, self.now)
        if nobody_has:
            assert member in nobody_has
        else:
            assert member is None if self.drop or not late else (late[0][0], member) in late
        if member is not None:
            self.has[worker] = member, self.now

    def take(self, member):
        first = member not in self.counted + self.dropped
        assert self.d.done(member) == first
        self.counted += [member] * first

    @precondition(lambda self: self.has)
    @rule(data=st.data())
    def finish(self, data):
        member, _ = self.has.pop(data.draw(st.sampled_from(sorted(self.has))))
        self.old.append(member)
        self.take(member)

    @rule(worker=st.sampled_from("abc"))
    def die(self, worker):
        self.d.lost(worker)
        self.old += [self.has.pop(worker)[0]] if worker in self.has else []

    @precondition(lambda self: self.old)
    @rule(data=st.data())
    def a_result_comes_after_all_or_again(self, data):
        self.take(data.draw(st.sampled_from(self.old)))

    @rule()
    def give_up(self):
        late = [member for _, member in self.late()] if self.drop else []
        assert sorted(self.d.give_up(self.now)) == sorted(late)
        self.dropped += late

    @invariant()
    def every_member_is_counted_dropped_or_open(self):
        assert sorted(self.d.dropped) == sorted(self.dropped) and len(set(self.counted + self.dropped)) == len(
            self.counted + self.dropped
        )
        assert self.d.finished == (len(self.counted + self.dropped) == len(self.members))

    @invariant()
    def overdue_is_when_the_next_is_late(self):
        latest = self.latest()
        assert self.d.overdue() == (min(latest.values()) + self.limit if latest and self.limit is not None else None)

    def teardown(self):
        """Whatever happened, one patient worker ends it."""
        if not hasattr(self, "d"):
            return
        for worker in list(self.has):
            self.die(worker)
        while (member := self.d.next("patient", self.now)) is not None:
            self.take(member)
        assert self.d.finished and sorted(self.counted + self.dropped) == list(self.members)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
