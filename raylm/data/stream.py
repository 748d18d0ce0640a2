"""One ordered stream of packed rows for any number of workers, from any step.

Every block of the stream is one micro-batch. Block j goes to worker j mod n, whatever the timing: Ray Data keeps the
order (`preserve_order`), cuts blocks of a fixed number of rows (`repartition(strict=True)`) and deals them in turn
(`streaming_split(equal=False)`). So global batch k is the same for any worker count.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from raylm.data.plan import RunPlan
from raylm.data.store import TokenStore, gather

if TYPE_CHECKING:
    from ray.data import Dataset

STEPS_PER_TASK = 4
MAX_TASKS = 1024

PACKED_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("epoch", pa.int32()),
        ("input_ids", pa.large_list(pa.int32())),
        ("loss_mask", pa.large_list(pa.bool_())),
        ("seq_lengths", pa.list_(pa.int32())),
        ("sources", pa.list_(pa.int64())),
    ]
)
"""`seq_lengths`: tokens of each sequence in the row; `sources`: their usable-row numbers (`TokenStore.source`)."""


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Sequences one after the other: input_ids (n,) int32, loss_mask (n,) bool, seq_lengths and sources (s,)."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    seq_lengths: np.ndarray
    sources: np.ndarray


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one rank sends through one forward: `micro_batch_size` packed rows of global batch `step`."""

    step: int
    epoch: int
    rows: list[PackedRow]


def ordered_stream(
    store: Any,
    plan: Any,
    *,
    start_step: int,
    num_steps: int,
    global_batch_size: int,
    micro_batch_size: int,
    beside_workers: bool = False,
) -> "Dataset":
    """Packed rows of steps start_step … num_steps - 1 as a dataset of one-micro-batch blocks.

    store, plan: object references of a TokenStore and a RunPlan. A gathering task takes one logical CPU.
    beside_workers: tasks take none, a few at a time: elastic workers fill whatever the cluster has, and would leave the
    tasks that feed them without a place.
    """
    import ray.data

    first, last = start_step * global_batch_size, num_steps * global_batch_size
    # A task gathers whole steps; a long run has larger tasks, not more of them.
    rows_per_task = global_batch_size * max(STEPS_PER_TASK, (num_steps - start_step) // MAX_TASKS)
    numbers = [np.arange(start, min(start + rows_per_task, last)) for start in range(first, last, rows_per_task)]
    dataset = (
        # Looks at the blocks here; from_arrow has a task look at each, which elastic workers would leave no place for.
        ray.data.from_blocks([pa.table({"row": part}) for part in numbers])
        # Ray Data fuses the two into one operator as long as both take its default of one CPU: one task, one hop.
        .map_batches(
            _gather_rows,
            fn_kwargs={"refs": (store, plan)},
            batch_size=micro_batch_size,
            batch_format="pyarrow",
        )
        .repartition(target_num_rows_per_block=micro_batch_size, strict=True)
    )
    if beside_workers:
        _take_no_cpu(dataset)
    return dataset


def _take_no_cpu(dataset: "Dataset") -> None:
    """`repartition` has no argument for what its tasks take, and is fused with a stage that takes the same only."""
    from ray.data import TaskPoolStrategy

    stage = dataset._logical_plan.dag
    for found in (stage, stage.input_dependencies[0]):
        found.ray_remote_args["num_cpus"] = 0
        object.__setattr__(found, "compute", TaskPoolStrategy(size=2))


def in_order(dataset: "Dataset") -> "Dataset":
    """The dataset, whose blocks come in their order wherever it is read."""
    dataset = dataset.copy(dataset)
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    return dataset


def split_in_turn(dataset: "Dataset", world_size: int) -> list[Any]:
    """One iterator for each worker; worker r receives blocks r, r + n, r + 2n … in order."""
    return list(in_order(dataset).streaming_split(world_size, equal=False))


def materialized_blocks(dataset: "Dataset") -> list[Any]:
    """References of all blocks, in order: for rows that are read many times, such as those of an evaluation."""
    return list(in_order(dataset).materialize().to_arrow_refs())


def micro_batches(shard: Any, micro_batch_size: int) -> Iterator[MicroBatch]:
    """The blocks of one worker's shard, as micro-batches."""
    for table in iter(shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)):
        assert table.num_rows == micro_batch_size, f"a block of {table.num_rows} rows, not {micro_batch_size}"
        yield to_micro_batch(table)


def to_micro_batch(table: pa.Table) -> MicroBatch:
    """One block of the stream."""
    steps, epochs = set(table["step"].to_pylist()), set(table["epoch"].to_pylist())
    assert len(steps) == 1, f"a micro-batch of several steps: {steps}"
    rows = [
        PackedRow(
            input_ids=np.asarray(table["input_ids"][row].values),
            loss_mask=np.asarray(table["loss_mask"][row].values.to_numpy(zero_copy_only=False), dtype=bool),
            seq_lengths=np.asarray(table["seq_lengths"][row].values),
            sources=np.asarray(table["sources"][row].values),
        )
        for row in range(table.num_rows)
    ]
    return MicroBatch(steps.pop(), epochs.pop(), rows)


def pack_rows(store: TokenStore, plan: RunPlan, rows: list[int]) -> pa.Table:
    """Packed rows as one table of PACKED_SCHEMA; rows: step x global_batch_size + place in the global batch."""
    columns: dict[str, list[Any]] = {name: [] for name in PACKED_SCHEMA.names}
    for number in rows:
        step, place = divmod(number, plan.global_batch_size)
        epoch, sequences = plan.row(step, place)
        ids, masks = gather(store, sequences)
        columns["step"].append(step)
        columns["epoch"].append(epoch)
        columns["input_ids"].append(np.concatenate(ids) if ids else np.zeros(0, np.int32))
        columns["loss_mask"].append(np.concatenate(masks) if masks else np.zeros(0, bool))
        columns["seq_lengths"].append(np.array([len(part) for part in ids], np.int32))
        columns["sources"].append(sequences)
    return pa.table([_column(columns[field.name], field.type) for field in PACKED_SCHEMA], schema=PACKED_SCHEMA)


def _gather_rows(batch: pa.Table, refs: tuple[Any, Any]) -> pa.Table:
    store, plan = _fetch(refs)
    return pack_rows(store, plan, batch["row"].to_pylist())


@lru_cache(maxsize=8)
def _fetch(refs: tuple[Any, Any]) -> tuple[TokenStore, RunPlan]:
    """The plan and the places of tokens, once per process."""
    import ray

    store, plan = ray.get(list(refs))
    return store, plan


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return pa.array(values, kind)
    flat = np.concatenate(values) if values else np.zeros(0)
    offsets = np.cumsum([0, *(len(value) for value in values)])
    if pa.types.is_large_list(kind):
        return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(flat, kind.value_type))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(flat, kind.value_type))
