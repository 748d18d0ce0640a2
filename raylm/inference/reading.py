"""Files of the input as batches of raw rows, read as they are needed; rows that are answered already are passed over.

A batch is one row of an Arrow table, so that Ray Data never cuts or joins one.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from raylm.data.readers import RawRow, read_rows
from raylm.data.remote import shown
from raylm.data.sources import SourceFile
from raylm.inference.ranges import Range, Ranges

logger = logging.getLogger(__name__)

_BATCH_BYTES = 8 * 2**20
_SCHEMA = pa.schema(
    [
        ("file", pa.int32()),
        ("start", pa.int64()),
        ("index", pa.large_list(pa.int64())),
        ("line", pa.large_list(pa.int64())),
        ("text", pa.large_list(pa.large_string())),
        ("format", pa.large_list(pa.string())),
        ("problem", pa.large_list(pa.large_string())),
        ("num_rows", pa.int64()),
    ]
)
"""start: place of the batch's first row among the rows of its file; num_rows: of the whole file, in a batch without
rows that comes last, else -1."""


def batch_of(file: int, start: int, rows: Sequence[RawRow], num_rows: int = -1) -> pa.Table:
    """A batch as a table of one row."""
    columns: Mapping[str, Any] = {
        "file": file,
        "start": start,
        "index": [row.index for row in rows],
        "line": [row.line for row in rows],
        "text": [row.text for row in rows],
        "format": [row.format for row in rows],
        "problem": [row.problem for row in rows],
        "num_rows": num_rows,
    }
    return pa.table([pa.array([columns[field.name]], field.type) for field in _SCHEMA], schema=_SCHEMA)


def rows_of(batch: Mapping[str, Any]) -> list[RawRow]:
    """The rows of a batch, given as the columns of its table's row."""
    columns = (batch[name] for name in ("index", "line", "text", "problem", "format"))
    return [RawRow(*values) for values in zip(*columns, strict=True)]


def batches_of(
    rows: Iterable[RawRow], file: int, done: Sequence[Range], batch_size: int, max_rows: int | None = None
) -> Iterator[pa.Table]:
    """Batches of what is not done, each of neighbours, and last the number of rows. max_rows: to look at.

    Where a file could not be read on, the last batch is of the rows before, and the number stays open: the file is not
    finished, and the next start reads it again.
    """
    known = Ranges(done)
    waiting: list[RawRow] = []
    size = place = 0
    for row in rows if max_rows != 0 else ():
        if row.unread:
            if waiting:
                yield batch_of(file, place - len(waiting), waiting)
            return
        if place not in known:
            waiting.append(row)
            size += len(row.text or "")
        place += 1
        next_is_done = place in known
        if waiting and (len(waiting) == batch_size or size > _BATCH_BYTES or next_is_done):
            first = place - len(waiting)
            yield batch_of(file, first, waiting)
            waiting, size = [], 0
        if place == max_rows:
            break
    if waiting:
        yield batch_of(file, place - len(waiting), waiting)
    yield batch_of(file, place, [], num_rows=place)


def read_files(
    numbers: pa.Table,
    files: Sequence[SourceFile],
    done: Mapping[int, Sequence[Range]],
    batch_size: int,
    max_rows: int | None,
) -> Iterator[pa.Table]:
    """Batches of files, one after the other; numbers: a column of lists of file numbers. max_rows: of all together."""
    left = max_rows
    for number in (number for group in numbers["numbers"].to_pylist() for number in group):
        file = files[number]
        num_rows = -1
        for table in batches_of(_warned(file), number, done.get(number, ()), batch_size, left):
            num_rows = table["num_rows"][0].as_py()
            yield table
        if left is not None:
            if num_rows < 0:
                return  # which rows of the next files count depends on this one
            left -= num_rows


def _warned(file: SourceFile) -> Iterator[RawRow]:
    """The rows of a file; says why where it cannot be read on."""
    for row in read_rows(file.path, file.options):
        if row.unread:
            logger.warning("%s: %s Its other rows wait for the next start.", shown(file.path), row.problem)
        yield row
