"""Parquet files with bounded memory: pages are looked at before they are unpacked, batches are sized to what they hold.

Arrow unpacks a page whole, and repeats a value of the dictionary for each row that has it, so a file of kilobytes may
ask for gigabytes. Sizes of pages stand only in their headers: those of large column chunks are read first. The price is
a small read a page for such chunks.
Source: github.com/apache/parquet-format, README and parquet.thrift; Thrift's compact protocol specification.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from raylm.data.schema import RowProblem

MAX_PAGE_BYTES = 512 * 2**20
_BATCH_ROWS = 64
_BATCH_BYTES = 64 * 2**20
_SMALL_CHUNK_BYTES = 64 * 2**20
_SMALL_DICTIONARY_BYTES = 2**20
_HEADER_BYTES = 512
_MAX_HEADER_BYTES = 16 * 2**20
_DICTIONARY_PAGE = 2


def parquet_batches(stream: Any) -> Iterator[Any]:
    """The record batches of a file, in order; each of a few times 64 MiB at most, or of what one page holds.

    Raises RowProblem for a page above MAX_PAGE_BYTES, and pa.ArrowInvalid.
    """
    import pyarrow.parquet as pq

    # A buffer makes Arrow read pages as they are needed instead of a whole row group.
    file = pq.ParquetFile(stream, buffer_size=2**20, pre_buffer=False)
    for number in range(file.num_row_groups):
        rows = _rows_at_once(stream, file.metadata.row_group(number))
        yield from file.iter_batches(batch_size=rows, row_groups=[number], use_threads=False)


def _rows_at_once(stream: Any, group: Any) -> int:
    row_bytes = 0
    for column in (group.column(number) for number in range(group.num_columns)):
        size = column.total_uncompressed_size
        if size <= (_SMALL_DICTIONARY_BYTES if column.has_dictionary_page else _SMALL_CHUNK_BYTES):
            continue
        values_in_row = max(1, column.num_values / max(1, group.num_rows))
        for page in _pages(stream, column):
            if page.num_bytes > MAX_PAGE_BYTES:
                raise RowProblem(
                    f"column {column.path_in_schema}: a page of {page.num_bytes // 2**20} MiB is more than "
                    f"{MAX_PAGE_BYTES // 2**20} MiB.",
                    "Write the file with smaller pages (pyarrow: write_batch_size=16).",
                )
            worst = page.num_bytes if page.is_dictionary else page.num_bytes / max(1, page.num_values) * values_in_row
            row_bytes = max(row_bytes, int(worst))
            if size <= _SMALL_CHUNK_BYTES:  # the dictionary comes first; the rest is small
                break
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, row_bytes)))


@dataclass(frozen=True, slots=True)
class _Page:
    """A page as its header describes it. num_bytes: unpacked."""

    is_dictionary: bool
    num_bytes: int
    num_values: int


def _pages(stream: Any, column: Any) -> Iterator[_Page]:
    """The pages of a column chunk, from their headers."""
    at = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
    at = min(at or column.data_page_offset, column.data_page_offset)
    end = at + column.total_compressed_size
    while at < end:
        fields, length = _header(stream, at)
        kind, num_bytes, packed_bytes = fields[1], fields[2], fields[3]
        of_kind: dict[int, Any] = next((fields[number] for number in (5, 7, 8) if number in fields), {})
        yield _Page(kind == _DICTIONARY_PAGE, num_bytes, of_kind.get(1, 1))
        at += length + packed_bytes


def _header(stream: Any, at: int) -> tuple[dict[int, Any], int]:
    """A page header and its length. Raises RowProblem for bytes that are none."""
    size = _HEADER_BYTES
    while size <= _MAX_HEADER_BYTES:
        stream.seek(at)
        reader = _Compact(stream.read(size))
        try:
            fields = reader.struct()
            if isinstance(fields[3], int) and fields[3] >= 0:
                return fields, reader.at
            break
        except IndexError:  # a longer header
            size *= 8
        except (KeyError, ValueError):
            break
    raise RowProblem("is not a readable Parquet file: a page header is damaged.")


class _Compact:
    """Just enough of Thrift's compact protocol to read integers out of nested structs. Raises IndexError at the end."""

    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 0

    def struct(self) -> dict[int, Any]:
        """Field number -> integer or struct; other kinds of fields are passed over as None."""
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            fields[number] = None if head & 15 in (1, 2) else self._value(head & 15)
        return fields

    def _value(self, kind: int) -> Any:
        if kind in (1, 2, 3):  # a truth value in a list, or a byte
            return self._byte()
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 7:
            return self._skip(8)
        if kind == 8:
            return self._skip(self._varint())
        if kind in (9, 10):
            head = self._byte()
            for _ in range(self._varint() if head >> 4 == 15 else head >> 4):
                self._value(head & 15)
            return None
        if kind == 12:
            return self.struct()
        raise ValueError(f"type {kind}")

    def _skip(self, length: int) -> None:
        self.at += length
        if self.at > len(self._data):
            raise IndexError

    def _byte(self) -> int:
        self._skip(1)
        return self._data[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
