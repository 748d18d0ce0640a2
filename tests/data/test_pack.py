import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylm.data.pack import best_fit, plan_epoch
from raylm.data.plan import plan_run

LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=200).map(lambda values: np.array(values, np.int32))


@given(LENGTHS)
def test_best_fit_uses_every_sequence_once_within_capacity(lengths: np.ndarray) -> None:
    rows = best_fit(lengths, 64)
    assert sorted(member for row in rows for member in row) == list(range(len(lengths)))
    assert all(lengths[row].sum() <= 64 for row in rows)


def test_best_fit_takes_the_fullest_row_that_still_fits() -> None:
    assert best_fit(np.array([6, 5, 4, 3, 2]), 10) == [[0, 2], [1, 3, 4]]


@given(LENGTHS, st.integers(0, 5), st.integers(0, 3), st.booleans(), st.booleans())
def test_an_epoch_is_a_function_of_its_arguments(
    lengths: np.ndarray, seed: int, epoch: int, packing: bool, shuffle: bool
) -> None:
    plans = [
        plan_epoch(lengths, max_seq_len=64, packing=packing, shuffle=shuffle, seed=seed, epoch=epoch) for _ in range(2)
    ]
    assert plans[0].sequences.tolist() == plans[1].sequences.tolist()
    assert plans[0].offsets.tolist() == plans[1].offsets.tolist()
    assert sorted(plans[0].sequences.tolist()) == list(range(len(lengths)))


def test_padding_is_small_on_conversations_of_usual_lengths() -> None:
    lengths = np.random.default_rng(0).gamma(2.0, 70.0, 5000).astype(np.int32).clip(5, 1024)
    plan = plan_epoch(lengths, max_seq_len=1024, packing=True, shuffle=True, seed=0, epoch=0)
    assert lengths.sum() / (plan.num_rows * 1024) > 0.97


def test_the_order_differs_between_epochs_and_seeds() -> None:
    """Y06."""
    lengths = np.full(50, 10, np.int32)
    run = plan_run(
        lengths, max_seq_len=10, packing=True, shuffle=True, seed=1, num_epochs=2, global_batch_size=4, max_steps=None
    )
    other = plan_epoch(lengths, max_seq_len=10, packing=True, shuffle=True, seed=2, epoch=0)
    orders = [run.epochs[0].sequences.tolist(), run.epochs[1].sequences.tolist(), other.sequences.tolist()]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_without_shuffling_the_order_of_the_files_is_kept() -> None:
    plan = plan_epoch(np.array([5, 7, 3]), max_seq_len=8, packing=False, shuffle=False, seed=0, epoch=4)
    assert plan.sequences.tolist() == [0, 1, 2]
    assert plan.num_rows == 3


def test_steps_cover_each_epoch_once_with_a_short_last_batch() -> None:
    run = plan_run(np.full(10, 8), max_seq_len=8, packing=True, shuffle=True, seed=0, num_epochs=2, global_batch_size=4)
    assert run.num_steps == 6
    assert run.tokens_per_step(np.full(10, 8)) == pytest.approx(80 / 3)
    for epoch in range(2):
        rows = [run.row(step, place) for step in range(epoch * 3, epoch * 3 + 3) for place in range(4)]
        assert {e for e, _ in rows} == {epoch}
        assert [len(sequences) for _, sequences in rows] == [1] * 10 + [0] * 2
        assert sorted(int(s) for _, sequences in rows for s in sequences) == list(range(10))


def test_max_steps_plans_no_epoch_it_never_reaches() -> None:
    run = plan_run(
        np.full(10, 8),
        max_seq_len=8,
        packing=True,
        shuffle=True,
        seed=0,
        num_epochs=9,
        global_batch_size=4,
        max_steps=4,
    )
    assert run.num_steps == 4
    assert len(run.epochs) == 2


def test_shuffling_forgets_the_order_of_the_files() -> None:
    """100,000 rows sorted by length: neighbours, and neighbouring packed rows, do not correlate in length."""
    lengths = np.sort(np.random.default_rng(0).integers(10, 1000, 100_000))
    for packing in (False, True):
        plan = plan_epoch(lengths, max_seq_len=1024, packing=packing, shuffle=True, seed=0, epoch=0)
        shuffled = lengths[plan.sequences]
        means = np.add.reduceat(shuffled, plan.offsets[:-1]) / np.diff(plan.offsets)
        assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.05
        assert np.corrcoef(shuffled[:-1], shuffled[1:])[0, 1] < 0.05  # packing sets long beside short


def test_weights_are_uses_in_an_epoch() -> None:
    lengths, weights = np.full(100, 8), np.repeat([1.0, 2.0, 0.5, 1.5], 25)
    epochs = []
    for epoch in range(2):
        plan = plan_epoch(lengths, max_seq_len=32, packing=True, shuffle=True, seed=0, epoch=epoch, weights=weights)
        uses = np.bincount(plan.sequences, minlength=100).reshape(4, 25)
        assert uses[0].tolist() == [1] * 25
        assert uses[1].tolist() == [2] * 25
        assert (uses[2].sum(), uses[2].max()) == (12, 1)
        assert (uses[3].sum(), set(uses[3])) == (25 + 12, {1, 2})
        epochs.append(uses[2].tolist())
    assert epochs[0] != epochs[1]
