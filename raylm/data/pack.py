"""Best-fit packing of tokenised sequences into rows of fixed length, planned from their lengths alone.

A row holds whole sequences; attention never crosses a boundary (models/attention.py). The plan is a pure function of
(lengths, seed, epoch): no token is touched until a row is needed, so any position of any epoch can be read directly.
The price is a sort per window and a little padding; concatenating and splitting leaves no padding but cuts
conversations.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from itertools import chain

import numpy as np

WINDOW = 4096
"""Sequences packed together: larger packs tighter, smaller shuffles finer."""


@dataclass(frozen=True, slots=True)
class EpochPlan:
    """Which sequences each packed row of one epoch holds.

    sequences: (n,) int64 indices of sequences, row after row; offsets: (rows + 1,) int64, row i holds
    sequences[offsets[i]:offsets[i + 1]].
    """

    sequences: np.ndarray
    offsets: np.ndarray

    @property
    def num_rows(self) -> int:
        """Packed rows in the epoch."""
        return len(self.offsets) - 1

    def row(self, index: int) -> np.ndarray:
        """The sequences of packed row `index`; none past the last row, which is how a short last batch is filled."""
        if index >= self.num_rows:
            return self.sequences[:0]
        return self.sequences[self.offsets[index] : self.offsets[index + 1]]


def plan_epoch(
    lengths: np.ndarray,
    *,
    max_seq_len: int,
    packing: bool,
    shuffle: bool,
    seed: int,
    epoch: int,
    weights: np.ndarray | None = None,
) -> EpochPlan:
    """Every sequence exactly once (or as often as its weight says), in packed rows of at most max_seq_len tokens.

    lengths: (n,) tokens of each sequence, each in 1..max_seq_len. weights: (n,) uses in an epoch; of a fraction, a
    share of the sequences is drawn anew each epoch. The order is a function of the arguments alone.
    """
    rng = np.random.default_rng([seed, epoch])
    members = np.arange(len(lengths)) if weights is None else _drawn(weights, rng)
    order = rng.permutation(members) if shuffle else members
    if not packing:
        return EpochPlan(order.astype(np.int64), np.arange(len(order) + 1, dtype=np.int64))
    sequences: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        packed = best_fit(lengths[window], max_seq_len)
        places = rng.permutation(len(packed)) if shuffle else range(len(packed))
        rows = [packed[place] for place in places]
        sizes.append(np.fromiter(map(len, rows), np.int64, len(rows)))
        sequences.append(window[np.fromiter(chain.from_iterable(rows), np.int64, len(window))])
    if not sequences:
        return EpochPlan(np.zeros(0, np.int64), np.zeros(1, np.int64))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(sizes))])
    return EpochPlan(np.concatenate(sequences).astype(np.int64), offsets)


def _drawn(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sequences as often as an epoch uses them: whole uses of each, and of each fraction its share of sequences."""
    times = np.floor(weights).astype(np.int64)
    for weight in np.unique(weights):
        fraction = weight - np.floor(weight)
        alike = np.flatnonzero(weights == weight)
        if fraction:
            times[rng.choice(alike, round(fraction * len(alike)), replace=False)] += 1
    return np.repeat(np.arange(len(weights)), times)


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each sequence, longest first, goes to the fullest row that still holds it.

    Returns the members of each row in their given order, rows ordered by their first member.
    """
    rows: list[list[int]] = []
    space: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for member in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[member])
        place = bisect_left(space, (length, -1))
        if place == len(space):
            rows.append([member])
            free, row = capacity - length, len(rows) - 1
        else:
            free, row = space.pop(place)
            rows[row].append(member)
            free -= length
        insort(space, (free, row))
    return sorted(sorted(row) for row in rows)
