"""Contract under test: overlap.py finds two ranges that meet if and only if there are two, against brute force."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from es_kernels.overlap import Range, find_overlap


def places(r):
    """All (space, place) of a range, one for each row that holds it."""
    return [(r.space, r.start + k * r.stride + i) for k in range(r.rows) for i in range(r.length)]


def are_met(a, b):
    return bool(set(places(a)) & set(places(b))) and not (a.read_only and b.read_only)


RANGES = st.lists(
    st.builds(
        Range,
        space=st.integers(0, 1),
        start=st.integers(0, 60),
        rows=st.integers(1, 4),
        length=st.integers(1, 6),
        stride=st.sampled_from((0, 1, 4, 7, 10, 10, 10, 13)),
        read_only=st.booleans(),
    ).map(lambda r: r if r.rows > 1 else r._replace(stride=r.length)),
    min_size=1,
    max_size=5,
)


@settings(max_examples=1500, deadline=None)
@given(RANGES)
@example([Range(0, 0, 2, 3, 10), Range(0, 10, 3, 3, 10)])  # the second row of the one meets the first of the other
@example([Range(0, 20, 3, 3, 10), Range(0, 0, 3, 3, 10)])
def test_overlap_is_found_exactly_where_there_is_one(ranges):
    """Against brute force; two that are only read may meet."""
    expected = {frozenset((i, j)) for i, a in enumerate(ranges) for j, b in enumerate(ranges[:i]) if are_met(a, b)}
    expected |= {
        frozenset((i,)) for i, r in enumerate(ranges) if len(set(places(r))) < len(places(r)) and not r.read_only
    }
    clash = find_overlap(ranges)
    assert clash is None and not expected or frozenset(clash) in expected
