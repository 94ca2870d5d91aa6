"""Where two ranges of rows meet: in memory, where one would overwrite the other, or in the indices of a stream, where
both would draw the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Range(NamedTuple):
    """`rows` intervals [start + k * stride, start + k * stride + length) of one `space`."""

    space: int
    start: int
    rows: int
    length: int
    stride: int
    read_only: bool = False


def find_overlap(ranges: Sequence[Range]) -> tuple[int, int] | None:
    """The positions in `ranges` of the first two that meet, or None. Two that are read only may meet. A range whose own
    rows overlap meets itself."""
    active: list[tuple[int, int, Range]] = []  # (end, position, range) of those that may still be met
    for i, r in sorted(enumerate(ranges), key=lambda numbered: numbered[1][:2]):
        if r.rows > 1 and r.stride < r.length and not r.read_only:
            return i, i
        active = [other for other in active if other[0] > r.start and other[2].space == r.space]
        for _, j, other in active:
            if not (r.read_only and other.read_only) and _meet(other, r):
                return j, i
        active.append((r.start + (r.rows - 1) * r.stride + r.length, i, r))
    return None


def _meet(a: Range, b: Range) -> bool:
    """Whether two ranges of one space share a place."""
    # Rows that lie on each other (stride 0, of an expanded tensor) are one row.
    a, b = (r if r.stride else r._replace(rows=1) for r in (a, b))
    if a.rows > b.rows:
        a, b = b, a
    lowest, rows = 0, a.rows
    if a.stride == b.stride:  # only the difference of the rows' numbers matters: one row of a against all differences
        lowest, rows = 1 - a.rows, 1
    for k in range(rows):
        start = a.start + k * a.stride - b.start  # of this row of a, seen from b
        first = max(lowest, -(-(start - b.length + 1) // b.stride)) if b.rows > 1 else 0
        last = min(b.rows - 1, (start + a.length - 1) // b.stride) if b.rows > 1 else 0
        if first <= last and start < first * b.stride + b.length and start + a.length > first * b.stride:
            return True
    return False
