"""Counts of a dataset as training would use it: tokens, loss, packing, the longest rows, duplicates."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from raylm.config.data import DataSection
from raylm.data.pack import plan_epoch
from raylm.data.readers import RawRow, place_in_file, read_rows
from raylm.data.sources import SourceFile, list_files
from raylm.data.store import TokenizerSource, raw_table, row_tokenizer
from raylm.errors import DataError

_BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True)
class DataStats:
    """rows = used + rejected (by reason). padding: share of a packed epoch's positions that hold no token.

    percentiles: tokens of a sequence at 0, 10, 50, 90, 99, 100 %. longest: (place, tokens). duplicates: rows whose
    text occurred before; duplicate_examples: (place, place of the first)."""

    rows: int
    used: int
    rejected: dict[str, int]
    sequences: int
    tokens: int
    loss_tokens: int
    straddling: int
    percentiles: dict[str, int]
    packed_rows: int
    padding: float
    longest: list[tuple[str, int]]
    duplicates: int
    duplicate_examples: list[tuple[str, str]] = field(default_factory=list)
    histogram: str | None = None


def data_stats(section: DataSection, source: TokenizerSource, *, histogram: Path | None = None) -> DataStats:
    """Reads and tokenises data.train in this process. histogram: a PNG of the lengths. Raises DataError, ModelError."""
    files = list_files(section.train)
    tokenizer = row_tokenizer(files, section, source)
    lengths: list[np.ndarray] = []
    places: list[str] = []
    reasons: Counter[str] = Counter()
    rows = used = loss = straddling = duplicates = 0
    first_seen: dict[bytes, str] = {}
    doubled: list[tuple[str, str]] = []
    for number, file in enumerate(files):
        for batch in _batches(file):
            for row in batch:
                if row.index < 0:
                    raise DataError(place_in_file(file.path, row.index, row.line), row.problem)
                rows += 1
                digest = hashlib.blake2b((row.text or str(rows)).encode(), digest_size=16).digest()
                here = place_in_file(file.path, row.index, row.line)
                before = first_seen.setdefault(digest, here)
                if before is not here:
                    duplicates += 1
                    doubled += [(here, before)] if len(doubled) < 5 else []
            table = tokenizer.table(raw_table(number, [(row, "" if row.text else "malformed") for row in batch]))
            found = table.select(["index", "line", "length", "loss_tokens", "straddling", "reason"]).to_pydict()
            seen: set[int] = set()
            for at, reason in enumerate(found["reason"]):
                if reason:
                    reasons[reason] += 1
                    continue
                seen.add(found["index"][at])
                places.append(place_in_file(file.path, found["index"][at], found["line"][at]))
            used += len(seen)
            good = np.array([not reason for reason in found["reason"]], bool)
            lengths.append(np.array(found["length"], np.int32)[good])
            loss += int(np.array(found["loss_tokens"])[good].sum()) if len(good) else 0
            straddling += int(np.array(found["straddling"])[good].sum()) if len(good) else 0
    joined = np.concatenate(lengths) if lengths else np.zeros(0, np.int32)
    packed = plan_epoch(
        joined, max_seq_len=section.max_seq_len, packing=section.packing, shuffle=section.shuffle, seed=0, epoch=0
    ).num_rows
    tokens = int(joined.sum())
    order = np.argsort(-joined, kind="stable")[:5].tolist()
    if histogram is not None and len(joined):
        _plot(joined, section.max_seq_len, histogram)
    return DataStats(
        rows=rows,
        used=used,
        rejected=dict(reasons),
        sequences=len(joined),
        tokens=tokens,
        loss_tokens=loss,
        straddling=straddling,
        percentiles={f"{q}%": int(np.percentile(joined, q)) for q in (0, 10, 50, 90, 99, 100)} if len(joined) else {},
        packed_rows=packed,
        padding=round(1 - tokens / (packed * section.max_seq_len), 4) if packed else 0.0,
        longest=[(places[place], int(joined[place])) for place in order],
        duplicates=duplicates,
        duplicate_examples=doubled,
        histogram=str(histogram) if histogram is not None and len(joined) else None,
    )


def _batches(file: SourceFile) -> Iterator[list[RawRow]]:
    rows = iter(read_rows(file.path, file.options))
    while batch := list(islice(rows, _BATCH_ROWS)):
        yield batch


def _plot(lengths: Any, max_seq_len: int, target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    axes.hist(lengths, bins=60)
    axes.set_xlabel(f"tokens of a sequence (max_seq_len {max_seq_len})")
    axes.set_ylabel("sequences")
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
