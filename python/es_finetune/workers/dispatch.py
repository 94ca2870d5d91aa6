"""Which member goes to which worker next. Nothing but this: no clock, no wire; the pool drives it, and so does the simulation of many workers."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable


class Dispatch:
    """The members of one generation, handed out one at a time to whoever is free, so that no worker waits for a slow one.

    A member that has been out for more than `limit` seconds is handed out once more as soon as a worker has nothing else to do (the first result
    counts), or with `drop` given up. limit=None: as long as it takes. Times are seconds of any clock.
    """

    def __init__(self, members: Iterable[int], limit: float | None = None, drop: bool = False):
        self.waiting = deque(members)
        self.limit, self.drop = limit, drop
        self.out: dict[tuple[Hashable, int], float] = {}  # (worker, member) -> since when; the longest out comes first
        self.open = set(self.waiting)  # neither done nor dropped
        self.dropped: list[int] = []

    def next(self, worker: Hashable, now: float) -> int | None:
        """A member for a worker that has none; None if there is nothing for it to do at this time."""
        if self.waiting:
            member = self.waiting.popleft()
        else:
            due = self.overdue()
            if self.drop or due is None or now <= due:
                return None
            latest: dict[int, float] = {}  # of members that no one has finished
            for (_, member), since in self.out.items():
                if member in self.open:
                    latest[member] = max(since, latest.get(member, since))
            late = [(since, member) for member, since in latest.items() if self._is_late(since, now)]
            if not late:
                return None
            _, member = min(late)
        self.out[worker, member] = now
        return member

    def done(self, worker: Hashable, member: int) -> bool:
        """The worker has this member's result; whether it is the first, which counts."""
        self.out.pop((worker, member), None)
        first = member in self.open
        self.open.discard(member)
        return first

    def lost(self, worker: Hashable) -> None:
        """The worker is gone, and with it what it was doing."""
        for of, member in [key for key in self.out if key[0] == worker]:
            del self.out[of, member]
            if member in self.open and not any(member == other for _, other in self.out):
                self.waiting.appendleft(member)

    def give_up(self, now: float) -> list[int]:
        """With `drop`: the members that are late now, which no longer count."""
        late = []
        for (_, member), since in self.out.items() if self.drop else ():
            if not self._is_late(since, now):
                break
            if member in self.open:
                late.append(member)
        self.open -= set(late)
        self.dropped += late
        return late

    def overdue(self) -> float | None:
        """When the next member will be late; None if none can be."""
        if self.limit is None:
            return None
        return next((since + self.limit for (_, member), since in self.out.items() if member in self.open), None)

    @property
    def finished(self) -> bool:
        """Whether every member is done or dropped."""
        return not self.open

    def _is_late(self, since: float, now: float) -> bool:
        return self.limit is not None and now - since > self.limit
