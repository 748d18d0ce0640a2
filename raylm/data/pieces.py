"""Byte-pair training carried on from where a tokenizer stopped: which joins of its tokens save most in a corpus.

The corpus comes as the tokenizer's own tokens, so a new merge only ever joins what the old ones left apart. Appended
behind them, in the order found, the tokenizer comes to the same joins, and text in which no new piece occurs keeps its
ids. A character that a tokenizer spells in bytes can be learnt as well: it saves its bytes but one.

Counts are kept up to date from merge to merge, over the different units of the corpus (words, mostly). The price of
being Python is memory and one core: 10,000 merges over 70,000 different units take a few seconds.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

Pair = tuple[int, int]
_CHARACTER = 0
_MERGE = 1


@dataclass(frozen=True, slots=True)
class Learnt:
    """A new symbol. pair: the symbols it joins, None for a character spelt in bytes; saves: tokens of the corpus."""

    symbol: int
    pair: Pair | None
    saves: int


def learn_pieces(
    units: Mapping[tuple[int, ...], int],
    characters: Mapping[int, int],
    *,
    first_symbol: int,
    accepts: Callable[[int, int], bool],
    min_frequency: int,
) -> Iterator[Learnt]:
    """The pieces that save most, the best first; ties go to the smaller symbols. Ends when none saves min_frequency.

    units: symbols within which merges may happen -> how often the corpus has them. characters: symbols that stand for a
    character spelt in bytes -> the number of bytes; they are joined to others only once they are learnt.
    first_symbol: what the first merge is called; the next are counted up. accepts: whether two symbols may be joined.
    """
    table = _PairTable(units)
    known = set(characters)
    heap: list[tuple[int, int, int, int]] = []
    for symbol, saved in _saved_by_characters(units, characters).items():
        if saved >= min_frequency:
            heap.append((-saved, _CHARACTER, symbol, 0))
    heap += [(-count, _MERGE, *pair) for pair, count in table.counts.items() if count >= min_frequency]
    heapq.heapify(heap)
    symbol = first_symbol
    while heap:
        negative, kind, left, right = heapq.heappop(heap)
        if kind == _CHARACTER:
            known.discard(left)
            yield Learnt(left, None, -negative)
            continue
        count = table.counts.get((left, right), 0)
        if count != -negative:  # other merges took some of its places since
            if count >= min_frequency:
                heapq.heappush(heap, (-count, _MERGE, left, right))
            continue
        # A character saves at least as much as any pair with it, so one that is not known by now never will be.
        if left in known or right in known or not accepts(left, right):
            continue
        yield Learnt(symbol, (left, right), count)
        for pair in table.join((left, right), symbol):
            if table.counts[pair] >= min_frequency:
                heapq.heappush(heap, (-table.counts[pair], _MERGE, *pair))
        symbol += 1


class _PairTable:
    """How often each pair of neighbours occurs, and in which units."""

    def __init__(self, units: Mapping[tuple[int, ...], int]) -> None:
        self._units = [list(unit) for unit in units]
        self._times = list(units.values())
        self.counts: Counter[Pair] = Counter()
        self._places: defaultdict[Pair, set[int]] = defaultdict(set)
        for place, (unit, times) in enumerate(zip(self._units, self._times, strict=True)):
            for pair in pairwise(unit):
                self.counts[pair] += times
                self._places[pair].add(place)

    def join(self, pair: Pair, symbol: int) -> set[Pair]:
        """Puts `symbol` in the place of a pair everywhere; returns the pairs that are new."""
        new: set[Pair] = set()
        for place in self._places.pop(pair, ()):
            self._join_in(place, pair, symbol, new)
        self.counts.pop(pair, None)
        return new

    def _join_in(self, place: int, pair: Pair, symbol: int, new: set[Pair]) -> None:
        """Joins within one unit; only the pairs beside a join change."""
        left, right = pair
        unit, times, counts = self._units[place], self._times[place], self.counts
        joined: list[int] = []
        at, size = 0, len(unit)
        while at < size:
            if unit[at] != left or at + 1 == size or unit[at + 1] != right:
                joined.append(unit[at])
                at += 1
                continue
            beside: list[Pair] = []
            if joined:
                counts[joined[-1], left] -= times
                beside.append((joined[-1], symbol))
            if at + 2 < size:
                counts[right, unit[at + 2]] -= times
                beside.append((symbol, unit[at + 2]))
            for found in beside:
                counts[found] += times
                self._places[found].add(place)
                new.add(found)
            joined.append(symbol)
            at += 2
        self._units[place] = joined


def _saved_by_characters(units: Mapping[tuple[int, ...], int], characters: Mapping[int, int]) -> Counter[int]:
    saved: Counter[int] = Counter()
    for unit, times in units.items():
        for symbol in unit:
            if symbol in characters:
                saved[symbol] += times * (characters[symbol] - 1)
    return saved
