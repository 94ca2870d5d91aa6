"""Which member goes to which worker next. Nothing but this: no clock, no wire; the pool drives it, and so does the
simulation of many workers."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable


class Dispatch:
    """The members of one generation, handed out one at a time to whoever is free: no worker waits for a slow one.

    Args:
        members: In the order in which they are handed out.
        limit: Seconds. A member that has been out for longer is handed out once more as soon as a worker has nothing
            else to do; the first result counts. None: it may take as long as it takes.
        drop: Give such a member up instead.

    Times are seconds of any clock.
    """

    def __init__(self, members: Iterable[int], limit: float | None = None, drop: bool = False):
        self.waiting = deque(members)
        self.limit, self.drop = limit, drop
        # Member -> who has it since when. Only members that still count; the one that was handed out last the longest
        # ago comes first.
        self.out: dict[int, dict[Hashable, float]] = {}
        self.dropped: list[int] = []

    def next(self, worker: Hashable, now: float) -> int | None:
        """A member for a worker that has none; None if there is nothing for it to do at this time."""
        if self.waiting:
            member = self.waiting.popleft()
        elif not self.drop and self._is_late(now):
            member = next(iter(self.out))
        else:
            return None
        self.out[member] = {**self.out.pop(member, {}), worker: now}
        return member

    def done(self, member: int) -> bool:
        """Someone has this member's result; whether it is the first, which counts."""
        if self.out.pop(member, None) is not None:
            return True
        if member in self.waiting:  # its worker had been given up for lost
            self.waiting.remove(member)
            return True
        return False

    def lost(self, worker: Hashable) -> None:
        """The worker is gone, and with it what it was doing."""
        for member, since in list(self.out.items()):
            if since.pop(worker, None) is not None and not since:
                del self.out[member]
                self.waiting.appendleft(member)
        self.out = dict(sorted(self.out.items(), key=lambda item: max(item[1].values())))

    def give_up(self, now: float) -> list[int]:
        """With `drop`: the members that are late now, which no longer count."""
        late = []
        while self.drop and self._is_late(now):
            late.append(next(iter(self.out)))
            del self.out[late[-1]]
        self.dropped += late
        return late

    def overdue(self) -> float | None:
        """When the next member will be late, or since when one is that has not been handed out again; None if none can
        be."""
        if self.limit is None or not self.out:
            return None
        return max(next(iter(self.out.values())).values()) + self.limit

    @property
    def finished(self) -> bool:
        """Whether every member is done or dropped."""
        return not self.waiting and not self.out

    def _is_late(self, now: float) -> bool:
        due = self.overdue()
        return due is not None and now > due
