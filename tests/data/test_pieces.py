"""Learning merges: against the slow, obvious way, and against the tokenizers library's own trainer."""

from collections import Counter
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from raylm.data.pieces import Learnt, learn_pieces

UNITS = st.dictionaries(
    st.lists(st.integers(0, 4), min_size=1, max_size=9).map(tuple), st.integers(1, 6), min_size=1, max_size=8
)


def _learn(units: dict[tuple[int, ...], int], min_frequency: int = 2) -> list[Learnt]:
    found = learn_pieces(units, {}, first_symbol=100, accepts=lambda one, other: True, min_frequency=min_frequency)
    return list(found)


def _joined(unit: tuple[int, ...], pair: tuple[int, int], symbol: int) -> tuple[int, ...]:
    result: list[int] = []
    at = 0
    while at < len(unit):
        hit = unit[at : at + 2] == pair
        result.append(symbol if hit else unit[at])
        at += 2 if hit else 1
    return tuple(result)


@settings(max_examples=200, deadline=None)
@given(UNITS)
def test_each_merge_is_the_most_frequent_pair_counted_anew(units: dict[tuple[int, ...], int]) -> None:
    current = list(units.items())
    for learnt in _learn(units):
        counts: Counter[tuple[int, int]] = Counter()
        for unit, times in current:
            for pair in pairwise(unit):
                counts[pair] += times
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        assert (learnt.pair, learnt.saves) == (best, counts[best])
        current = [(_joined(unit, best, learnt.symbol), times) for unit, times in current]
    left: Counter[tuple[int, int]] = Counter()
    for unit, times in current:
        for pair in pairwise(unit):
            left[pair] += times
    assert max(left.values(), default=0) < 2


def test_the_first_merges_are_those_of_the_librarys_trainer() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    text = "low lower lowest newer newest wider widest slow slower slowest " * 3 + "low new wide"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=60, show_progress=False, min_frequency=2))
    import json

    expected = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    letters = sorted(set(text) - {" "})
    units = Counter(tuple(letters.index(c) for c in word) for word in text.split())
    names = dict(enumerate(letters))
    found = []
    for learnt in _learn(dict(units)):
        assert learnt.pair is not None
        left, right = (names[part] for part in learnt.pair)
        names[learnt.symbol] = left + right
        found.append((left, right))
    assert len(found) >= 10
    assert {"".join(pair) for pair in found[:10]} == {"".join(pair) for pair in expected[:10]}


def test_a_character_is_worth_its_bytes_but_one_and_joins_once_it_is_known() -> None:
    units = {(-5, -6): 4, (1, 2): 9, (-7, 3): 1}
    found = learn_pieces(
        units, {-5: 3, -6: 3, -7: 3}, first_symbol=100, accepts=lambda one, other: True, min_frequency=3
    )
    assert list(found) == [
        Learnt(100, (1, 2), 9),
        Learnt(-6, None, 8),
        Learnt(-5, None, 8),
        Learnt(101, (-5, -6), 4),
    ]


def test_refused_pairs_are_never_joined() -> None:
    units = {(1, 2, 3): 5}
    found = learn_pieces(units, {}, first_symbol=100, accepts=lambda one, other: one != 1, min_frequency=1)
    assert list(found) == [Learnt(100, (2, 3), 5)]
