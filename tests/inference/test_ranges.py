"""Ranges of rows against plain sets, whatever is added in whatever order."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylm.inference.ranges import Ranges


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), max_size=30))
def test_ranges_are_the_set_of_their_rows_and_take_no_row_twice(added: list[tuple[int, int]]) -> None:
    ranges, rows = Ranges(), set[int]()
    for start, length in added:
        new = set(range(start, start + length))
        if new & rows:
            before = list(ranges)
            with pytest.raises(ValueError, match="there already"):
                ranges.add(start, start + length)
            assert list(ranges) == before
        else:
            ranges.add(start, start + length)
            rows |= new
    assert {row for row in range(60) if row in ranges} == rows
    assert len(ranges) == len(rows)
    found = list(ranges)
    assert [row for start, stop in found for row in range(start, stop)] == sorted(rows)
    assert all(one[1] < other[0] for one, other in pairwise(found)), "neighbours are joined"
    assert all(ranges.is_all_of(length) == (rows == set(range(length))) for length in (0, 1, 7, len(rows)))


@pytest.mark.parametrize("wrong", [(3, 3), (3, 2), (-1, 1)])
def test_what_is_no_range_is_refused(wrong: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="no range"):
        Ranges().add(*wrong)
