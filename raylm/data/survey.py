"""How many sequences a dataset gives, and how long they are, before anything is tokenised for good and without Ray.

From the cache where a former run filled it; by tokenising here where the files are small; else from the first rows of
each file, which is an estimate: what follows is taken to be like them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from raylm.config.data import DataSection, SourceSection
from raylm.data.cache import cache_root, existing
from raylm.data.files import num_bytes
from raylm.data.readers import RawRow, place_in_file
from raylm.data.remote import scheme_of
from raylm.data.sources import SourceFile, list_files
from raylm.data.store import SMALL_BYTES, Keep, TokenizerSource, cache_key, raw_rows, raw_table, row_tokenizer
from raylm.data.tokenize import RowTokenizer
from raylm.errors import DataError

SAMPLE_ROWS = 512
"""Of each file, where they are sampled."""
_BATCH_ROWS = 256
_COLUMNS = ["file", "index", "length", "loss_tokens", "reason"]


@dataclass(frozen=True, slots=True)
class Survey:
    """lengths: (n,) int32 tokens of each sequence; weights: (n,) uses in an epoch, None for one each; loss_share: of
    the tokens, those that carry loss; source: `cache` or `tokenised` (exact), `sample`, or `beginning`, where the size
    of the rest is unknown (compressed files, addresses)."""

    lengths: np.ndarray
    weights: np.ndarray | None
    loss_share: float
    source: str

    @property
    def exact(self) -> bool:
        """Whether these are the run's own sequences."""
        return self.source in ("cache", "tokenised")


def survey(sources: Sequence[SourceSection], section: DataSection, source: TokenizerSource, *, seed: int) -> Survey:
    """Looks at datasets as `tokenize_files` would read them. Raises DataError and ModelError."""
    files = list_files(sources)
    tokenizer = source.load()
    root = cache_root(section.cache, num_nodes=1)
    key = cache_key(files, section, tokenizer, source.name, seed) if root else None
    if root and key:
        entry = existing(root, key)
        shards = entry.shards()
        if shards is not None:
            found = [_found(entry.columns(shard, _COLUMNS).to_pydict()) for shard in shards]
            return _summary(found, files, section, "cache")
    sizes = [num_bytes(file.path) for file in files]
    small = None not in sizes and sum(size or 0 for size in sizes) <= SMALL_BYTES
    rows = row_tokenizer(files, section, source, tokenizer)
    keep = Keep(section.sample, seed, section.max_rows)
    read = [_read(number, file, rows, keep, None if small else SAMPLE_ROWS) for number, file in enumerate(files)]
    if all(complete for _, complete, _ in read):
        return _summary([found for found, _, _ in read], files, section, "tokenised")
    return _extrapolated(read, files, section)


@dataclass(frozen=True, slots=True)
class _Found:
    files: np.ndarray
    indices: np.ndarray
    lengths: np.ndarray
    loss: np.ndarray
    reasons: list[str]


def _found(columns: dict[str, list[Any]]) -> _Found:
    return _Found(
        np.asarray(columns["file"], np.int32),
        np.asarray(columns["index"], np.int64),
        np.asarray(columns["length"], np.int32),
        np.asarray(columns["loss_tokens"], np.int64),
        columns["reason"],
    )


def _read(number: int, file: SourceFile, rows: RowTokenizer, keep: Keep, limit: int | None) -> tuple[_Found, bool, int]:
    """The sequences of a file's first rows, whether these are all, and the bytes of text they are."""
    stream = raw_rows(file, number, keep)
    batches: list[dict[str, list[Any]]] = []
    taken = size = 0
    ended = False
    while not ended and (limit is None or taken < limit):
        batch: list[tuple[RawRow, str]] = list(islice(stream, _BATCH_ROWS))
        ended = not batch or batch[-1][1] == "end"
        fault = next((row for row, _ in batch if row.index < 0), None)
        if fault is not None:
            raise DataError(place_in_file(file.path, fault.index, fault.line), fault.problem)
        taken += len(batch)
        size += sum(len((row.text or "").encode()) for row, _ in batch)
        batches.append(rows.table(raw_table(number, batch)).select(_COLUMNS).to_pydict())
    found = _found({name: [value for part in batches for value in part[name]] for name in _COLUMNS})
    return found, ended, size


def _used(found: Sequence[_Found]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    good = [np.array([not reason for reason in part.reasons], bool) for part in found]
    columns = ("files", "indices", "lengths", "loss")
    joined = (
        np.concatenate([getattr(part, name)[keep] for part, keep in zip(found, good, strict=True)]) for name in columns
    )
    files, indices, lengths, loss = joined
    return files, indices, lengths, loss


def _summary(found: Sequence[_Found], files: Sequence[SourceFile], section: DataSection, source: str) -> Survey:
    of, indices, lengths, loss = _used(found)
    if section.max_rows is not None and len(of):
        new = np.concatenate([[True], (of[1:] != of[:-1]) | (indices[1:] != indices[:-1])])
        kept = np.cumsum(new) <= section.max_rows
        of, lengths, loss = of[kept], lengths[kept], loss[kept]
    return _as_survey(of, lengths, loss, files, source)


def _as_survey(
    of: np.ndarray, lengths: np.ndarray, loss: np.ndarray, files: Sequence[SourceFile], source: str
) -> Survey:
    by_file = np.array([file.weight for file in files], np.float64)
    weights = by_file[of] if np.any(by_file != 1) else None
    tokens = int(lengths.sum())
    return Survey(lengths.astype(np.int32), weights, float(loss.sum()) / tokens if tokens else 0.0, source)


def _extrapolated(
    read: Sequence[tuple[_Found, bool, int]], files: Sequence[SourceFile], section: DataSection
) -> Survey:
    parts, source = [], "sample"
    for (found, complete, size), file in zip(read, files, strict=True):
        of, _, lengths, loss = _used([found])
        rows = len({int(index) for index, reason in zip(found.indices, found.reasons, strict=True) if not reason})
        times = 1.0 if complete else _times(file, found, size)
        if times is None:
            times, source = 1.0, "beginning"
        if section.max_rows is not None and rows:
            times = min(times, section.max_rows / rows)
        count = round(len(lengths) * times)
        place = np.resize(np.arange(len(lengths)), count) if len(lengths) else np.zeros(0, int)
        parts.append((of[place], lengths[place], loss[place]))
    of, lengths, loss = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return _as_survey(of, lengths, loss, files, source)


def _times(file: SourceFile, found: _Found, size: int) -> float | None:
    """How many times the sample the file is; None where that cannot be told without reading it all."""
    rows = max(1, int(found.indices.max()) + 1 if len(found.indices) else 1)
    if Path(file.path).suffix == ".parquet" and not scheme_of(file.path):
        import pyarrow.parquet as pq

        return float(pq.ParquetFile(file.path).metadata.num_rows / rows)
    whole = num_bytes(file.path)
    return None if whole is None else max(1.0, whole / max(1, size))
