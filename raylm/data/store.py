"""Tokenised rows in Ray's object store: read, rendered and tokenised once, then gathered by index in any order.

Blocks are shared memory on each node and spill to disk when they outgrow it; a gathering task maps them without a
copy. The driver keeps only lengths and places: 20 bytes a row.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from raylm.config.data import DataSection
from raylm.data.report import DataReport, RejectedRow
from raylm.data.sources import list_files, read_file
from raylm.data.templates import ChatTemplate
from raylm.data.tokenize import tokenize_table
from raylm.data.tokenizer import load_tokenizer

READ_ROWS = 1024
TOKENIZE_ROWS = 1024
TASK_CPUS = 0.5


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    """Where a worker loads the tokenizer from; `name` is what messages call the model."""

    folder: str
    name: str
    revision: str | None = None
    trust_remote_code: bool = False

    def load(self) -> Any:
        """The tokenizer."""
        return load_tokenizer(self.folder, revision=self.revision, trust_remote_code=self.trust_remote_code)


@dataclass(frozen=True, slots=True)
class TokenStore:
    """Usable rows of a dataset, as columns and as object references of the blocks that hold their tokens.

    lengths: (n,) int32 tokens of each usable row; blocks, places: (n,) where its tokens are; files, indices: (n,)
    where it came from.
    """

    refs: list[Any]
    lengths: np.ndarray
    blocks: np.ndarray
    places: np.ndarray
    files: np.ndarray
    indices: np.ndarray
    file_names: tuple[str, ...]

    def source(self, row: int) -> tuple[str, int]:
        """File and instance that a usable row came from."""
        return self.file_names[int(self.files[row])], int(self.indices[row])


def tokenize_files(
    paths: tuple[str, ...], section: DataSection, tokenizer: TokenizerSource
) -> tuple[TokenStore, DataReport]:
    """Reads, renders and tokenises dataset files with Ray Data, in file order.

    Needs an initialised Ray. Faults of rows are in the report, not raised. Raises DataError for missing files.
    """
    import ray.data

    files = list_files(paths)
    items = [{"path": path, "file": number} for number, path in enumerate(files)]
    cpus = int(ray.cluster_resources().get("CPU", 1))
    dataset = (
        ray.data.from_items(items, override_num_blocks=len(items))
        .map_batches(
            _read_files,
            fn_kwargs={"role_map": dict(section.role_map)},
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=TASK_CPUS,
        )
        .map_batches(
            _TokenizeStage,
            fn_constructor_kwargs={"source": tokenizer, "max_seq_len": section.max_seq_len},
            batch_size=TOKENIZE_ROWS,
            batch_format="pyarrow",
            num_cpus=TASK_CPUS,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, cpus // 2)),
        )
    )
    # Half a CPU each, so that the two stages run beside each other on a cluster of one CPU.
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    return _index(dataset.materialize(), tuple(files))


def gather(store: TokenStore, rows: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """input_ids (int32) and loss masks (bool) of usable rows, in the given order. Runs in a Ray task or actor."""
    ids: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    for row in rows:
        offsets, block_ids, block_masks = _block(store.refs[int(store.blocks[row])])
        place = int(store.places[row])
        ids.append(block_ids[offsets[place] : offsets[place + 1]])
        masks.append(block_masks[offsets[place] : offsets[place + 1]])
    return ids, masks


@lru_cache(maxsize=64)
def _block(ref: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    import ray

    table = ray.get(ref)
    column = table["input_ids"].combine_chunks()
    mask = table["loss_mask"].combine_chunks()
    return (
        np.asarray(column.offsets),
        np.asarray(column.values),
        np.asarray(mask.values.to_numpy(zero_copy_only=False), dtype=bool),
    )


def _read_files(batch: pa.Table, role_map: dict[str, str]) -> Any:
    for path, number in zip(batch["path"].to_pylist(), batch["file"].to_pylist(), strict=True):
        rows: list[tuple[int, str | None, str]] = []
        for row in read_file(path, role_map):
            rows.append((row.index, row.conversation, row.problem))
            if len(rows) == READ_ROWS:
                yield _rows_table(number, rows)
                rows = []
        yield _rows_table(number, rows)


def _rows_table(file: int, rows: list[tuple[int, str | None, str]]) -> pa.Table:
    return pa.table(
        {
            "file": pa.array([file] * len(rows), pa.int32()),
            "index": pa.array([row[0] for row in rows], pa.int64()),
            "conversation": pa.array([row[1] for row in rows], pa.large_string()),
            "problem": pa.array([row[2] for row in rows], pa.large_string()),
        }
    )


class _TokenizeStage:
    """Loads the tokenizer in the worker, then calls the plain function that the unit tests call."""

    def __init__(self, source: TokenizerSource, max_seq_len: int) -> None:
        self._tokenizer = source.load()
        self._template = ChatTemplate(self._tokenizer, source.name)
        self._max_seq_len = max_seq_len

    def __call__(self, batch: pa.Table) -> pa.Table:
        return tokenize_table(batch, self._template, self._tokenizer, max_seq_len=self._max_seq_len)


def _index(dataset: Any, files: tuple[str, ...]) -> tuple[TokenStore, DataReport]:
    """Keeps lengths and places of usable rows, and the rejected rows, from a materialised dataset of TOKENS_SCHEMA."""
    import ray

    refs = dataset.to_arrow_refs()
    columns = ["file", "index", "length", "loss_tokens", "reason", "problem"]
    select = ray.remote(lambda table: table.select(columns) if table.num_rows else None).options(num_cpus=0)
    heads = ray.get([select.remote(ref) for ref in refs])
    parts: list[dict[str, np.ndarray]] = []
    rejected: list[RejectedRow] = []
    num_rows = loss_tokens = 0
    for block, head in enumerate(heads):
        if head is None:
            continue
        num_rows += head.num_rows
        reasons = np.asarray(head["reason"].to_pylist(), dtype=object)
        used = np.flatnonzero(reasons == "")
        numbers, indices = np.asarray(head["file"]), np.asarray(head["index"])
        loss_tokens += int(np.asarray(head["loss_tokens"])[used].sum())
        parts.append(
            {
                "lengths": np.asarray(head["length"])[used],
                "blocks": np.full(len(used), block, np.int32),
                "places": used.astype(np.int64),
                "files": numbers[used],
                "indices": indices[used],
            }
        )
        for place in np.flatnonzero(reasons != ""):
            problem = head["problem"][int(place)].as_py()
            rejected.append(RejectedRow(files[numbers[place]], int(indices[place]), reasons[place], problem))
    empty = {"lengths": np.int32, "blocks": np.int32, "places": np.int64, "files": np.int32, "indices": np.int64}
    columns_of = {
        name: np.concatenate([part[name] for part in parts]) if parts else np.zeros(0, kind)
        for name, kind in empty.items()
    }
    store = TokenStore(refs=refs, file_names=files, **columns_of)
    report = DataReport(
        rows=num_rows,
        used=len(store.lengths),
        rejected=tuple(rejected),
        tokens=int(store.lengths.sum()),
        loss_tokens=loss_tokens,
    )
    return store, report
