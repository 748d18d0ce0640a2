"""Which rows of a file are done, as half-open ranges that touch nowhere: memory grows with the gaps, not the rows."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

Range = tuple[int, int]


class Ranges:
    """A set of row numbers."""

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        for start, stop in ranges:
            self.add(start, stop)

    def add(self, start: int, stop: int) -> None:
        """Adds rows [start, stop). Raises ValueError where one of them is there already, or the range is empty."""
        if start < 0 or stop <= start:
            raise ValueError(f"[{start}, {stop}) is no range of rows")
        place = bisect_left(self._starts, start)
        if (place and self._stops[place - 1] > start) or (place < len(self._starts) and self._starts[place] < stop):
            raise ValueError(f"rows of [{start}, {stop}) are there already")
        joins_left = place > 0 and self._stops[place - 1] == start
        joins_right = place < len(self._starts) and self._starts[place] == stop
        if joins_left and joins_right:
            self._stops[place - 1] = self._stops.pop(place)
            del self._starts[place]
        elif joins_left:
            self._stops[place - 1] = stop
        elif joins_right:
            self._starts[place] = start
        else:
            self._starts.insert(place, start)
            self._stops.insert(place, stop)

    def __contains__(self, row: int) -> bool:
        place = bisect_right(self._starts, row)
        return place > 0 and row < self._stops[place - 1]

    def __iter__(self) -> Iterator[Range]:
        return iter(list(zip(self._starts, self._stops, strict=True)))

    def __len__(self) -> int:
        """The number of rows."""
        return sum(self._stops) - sum(self._starts)

    def is_all_of(self, num_rows: int) -> bool:
        """Whether these are the rows [0, num_rows), each of them and no other."""
        return list(self) == ([(0, num_rows)] if num_rows else [])
