"""The ordered stream on a real Ray: the same global batches for any number of workers, from any step."""

import threading
from typing import Any

import pytest

from raylm.config.data import DataSection
from raylm.data import store as store_module
from raylm.data.plan import plan_run
from raylm.data.store import TokenizerSource, tokenize_files
from raylm.data.stream import materialized_blocks, micro_batches, ordered_stream, split_in_turn, to_micro_batch
from tests.conftest import PAIRS


def _read(shards: list[Any], micro: int) -> list[Any]:
    """All micro-batches of all workers, read at the same time as workers do, dealt back into one order."""
    received: list[list[Any]] = [[] for _ in shards]

    def work(rank: int) -> None:
        received[rank] += micro_batches(shards[rank], micro)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(shards))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    total = sum(len(part) for part in received)
    return [received[number % len(shards)][number // len(shards)] for number in range(total)]


def _content(batches: list[Any]) -> list[Any]:
    return [
        (
            batch.step,
            batch.epoch,
            [(row.sources.tolist(), row.input_ids.tolist(), row.loss_mask.tolist()) for row in batch.rows],
        )
        for batch in batches
    ]


def test_global_batches_do_not_depend_on_the_number_of_workers(
    ray_cluster: Any, tiny_model_dir: Any, write_dataset: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Y01, Y06, Y07, Q03: nothing is lost, doubled or out of turn."""
    import ray

    monkeypatch.setattr(store_module, "SMALL_BYTES", -1)  # the way of large datasets

    rows: list[Any] = [*PAIRS, {"messages": []}, ("too long", "yes " * 200)]
    path = write_dataset(rows)
    section = DataSection(train=(str(path),), max_seq_len=64, cache=False)
    store, report = tokenize_files(section.train, section, TokenizerSource(str(tiny_model_dir), "tiny"))
    assert report.rejected_by_reason == {"malformed": 1, "too_long": 1}
    assert (report.rows, report.used) == (42, 40)
    assert store.source(39) == (str(path), 39)
    plan = plan_run(
        store.lengths, max_seq_len=64, packing=True, shuffle=True, seed=3, num_epochs=2, global_batch_size=8
    )
    references = ray.put(store), ray.put(plan)

    def stream(start: int) -> Any:
        return ordered_stream(
            *references, start_step=start, num_steps=plan.num_steps, global_batch_size=8, micro_batch_size=2
        )

    one = _content(_read(split_in_turn(stream(0), 1), 2))
    assert _content(_read(split_in_turn(stream(0), 2), 2)) == one
    assert _content(_read(split_in_turn(stream(3), 4), 2)) == [batch for batch in one if batch[0] >= 3]
    assert _content([to_micro_batch(ray.get(block)) for block in materialized_blocks(stream(0))]) == one
    for epoch in range(2):
        seen = sorted(s for _, e, rows in one if e == epoch for sources, _, _ in rows for s in sources)
        assert seen == list(range(40))
