"""Files into raw rows: one JSON text a row, with where it stands. Memory is bounded by the longest row.

JSON Lines are cut but not parsed here: that happens in the workers that render them, many at a time. What is wrong
with a row travels as data, so that the driver reports the first fault in file order whatever finishes first.
"""

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from raylm.data.files import open_bytes, open_random_access, suffix_of
from raylm.data.formats import LMFLOW_TYPES
from raylm.data.parquet import parquet_batches
from raylm.data.remote import reason, scheme_of, shown
from raylm.data.schema import DECODER, RowProblem
from raylm.errors import nearest

MAX_ROW_BYTES = 64 * 2**20
_CHUNK_CHARS = 2**20
_LMFLOW_HEAD = re.compile(r'\s*\{\s*"[^"]*"\s*:')


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row of a file. index: from 0, -1 for a fault of the whole file; line: from 1, 0 where files have no lines;
    text: the row as JSON, None with a problem; format: what the file says of itself, else ""; unread: the fault was one
    of reading (a disk, a network), so that the same file may be read on another day."""

    index: int
    line: int
    text: str | None
    problem: str = ""
    format: str = ""
    unread: bool = False


def read_rows(path: str, options: "ReadOptions | None" = None) -> Iterator[RawRow]:
    """The rows of a dataset file, in order. An empty file has none. Faults are rows with a problem."""
    try:
        if scheme_of(path) == "hf":
            yield from _read_hub(path, options or ReadOptions())
            return
        reader = READERS.get(suffix_of(path))
        if reader is None:
            raise RowProblem(f"is not of a known kind ({', '.join(READERS)}).", "Rename or convert it.")
        yield from reader(path)
    except RowProblem as fault:
        yield RawRow(-1, 0, None, str(fault))
    except UnicodeDecodeError as error:
        yield RawRow(-1, 0, None, f"is not UTF-8 text (byte {error.start}). Save it as UTF-8.")
    except OSError as error:
        # Of damaged content, such as a cut .gz, the libraries raise OSErrors without a number.
        unread = error.errno is not None or isinstance(error, TimeoutError | ConnectionError)
        yield RawRow(-1, 0, None, f"cannot be read: {error.strerror or reason(error)}.", unread=unread)


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """What a hub dataset needs besides its id."""

    config: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = True


def place_in_file(path: str, index: int, line: int) -> str:
    """How messages name a row: `a.jsonl: line 3`, `a.json: instance 2 (line 9)`, `a.parquet: row 5`."""
    path = shown(path)
    if index < 0:
        return path if line <= 0 else f"{path}: line {line}"
    if suffix_of(path) in (".jsonl", ".ndjson", ".csv", ".tsv", ".txt"):
        return f"{path}: line {line}"
    if line > 0:
        return f"{path}: instance {index} (line {line})"
    return f"{path}: row {index}"


def _read_lines(path: str) -> Iterator[RawRow]:
    index = 0
    with open_bytes(path) as stream:
        for line, raw in enumerate(_lines(stream), start=1):
            if raw is None:
                yield RawRow(index, line, None, _too_long())
                index += 1
                continue
            try:
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8").strip(" \t\r\n")
            except UnicodeDecodeError as error:
                yield RawRow(index, line, None, f"is not UTF-8 text (byte {error.start} of the line).")
                index += 1
                continue
            if text:
                yield RawRow(index, line, text)
                index += 1


def _lines(stream: IO[bytes]) -> Iterator[bytes | None]:
    """Lines without more memory than the longest allowed one; None for a longer one. Only b"\\n" ends a line."""
    while line := stream.readline(MAX_ROW_BYTES + 1):
        if len(line) <= MAX_ROW_BYTES:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(MAX_ROW_BYTES)
        yield None


class _Text:
    """Decoded text of a file, a chunk at a time: `buffer[at:]` is what is not consumed yet."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self.buffer, self.at, self.ended = "", 0, False
        self._line, self._counted = 1, 0

    def line(self) -> int:
        """The line of the character at hand."""
        self._line += self.buffer.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def more(self) -> None:
        """Reads on, and forgets what is consumed; at the end of the file sets `ended`."""
        line, rest = self.line(), self.buffer[self.at :]
        if len(rest) > MAX_ROW_BYTES:
            raise RowProblem(f"line {line}: a row is longer than {MAX_ROW_BYTES // 2**20} MiB. Split or remove it.")
        data = self._stream.read(max(_CHUNK_CHARS, len(rest)))
        self.ended = not data
        self.buffer, self.at, self._counted = rest + self._decode(data, final=self.ended), 0, 0

    def skip(self) -> str:
        """The next character that is not white space, not consumed; empty at the end."""
        while True:
            while self.at < len(self.buffer) and self.buffer[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if self.ended:
                return ""
            self.more()

    def value(self) -> tuple[Any, str, int]:
        """The next JSON value, its text and its line. Raises RowProblem."""
        self.skip()
        line = self.line()
        while True:
            try:
                value, end = DECODER.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                if self.ended:
                    raise self.fault(error.msg, error.pos) from None
            except RowProblem as problem:
                raise RowProblem(f"line {line}: {problem.problem}", problem.remedy) from None
            else:
                if end < len(self.buffer) or self.ended:  # a number may go on in the next chunk
                    text = self.buffer[self.at : end]
                    self.at = end
                    return value, text, line
            self.more()

    def fault(self, message: str, position: int | None = None) -> RowProblem:
        """A syntax error with line and column."""
        position = self.at if position is None else position
        line = self.line() + self.buffer.count("\n", self.at, position)
        column = position - self.buffer.rfind("\n", 0, position)
        return RowProblem(f"line {line}, column {column}: not valid JSON: {message}.")


def _read_json(path: str) -> Iterator[RawRow]:
    """An LMFlow document, an array, or values one after the other."""
    with open_bytes(path) as stream:
        text = _Text(stream)
        first = text.skip()
        if first == "[":
            yield from _array(text, "")
        elif first == "{" and _is_lmflow(text):
            yield from _lmflow(text)
        elif first == "{":
            yield from _values(text)
        elif first:
            raise text.fault("an object or a list is expected")


def _is_lmflow(text: _Text) -> bool:
    """An LMFlow document has a list `instances` beside its other keys; a row has not."""
    while not text.ended and len(text.buffer) < 65536:
        text.more()
    return bool(_LMFLOW_HEAD.match(text.buffer)) and '"instances"' in text.buffer[:65536]


def _values(text: _Text) -> Iterator[RawRow]:
    index = 0
    while text.skip():
        _, row, line = text.value()
        yield RawRow(index, line, row)
        index += 1


def _array(text: _Text, form: str) -> Iterator[RawRow]:
    """The elements of the array at hand, past its closing bracket."""
    text.at += 1
    index = 0
    if text.skip() == "]":
        text.at += 1
        return
    while True:
        _, row, line = text.value()
        yield RawRow(index, line, row, format=form)
        index += 1
        sign = text.skip()
        if sign not in (",", "]") or not sign:
            raise text.fault("a comma or the end of the list is expected")
        text.at += 1
        if sign == "]":
            return


def _lmflow(text: _Text) -> Iterator[RawRow]:
    expected = 'Expected {"type": "conversation", "instances": […]}.'
    kind: Any = None
    text.at += 1
    found = False
    while (sign := text.skip()) != "}":
        if sign == ",":
            text.at += 1
            continue
        key, _, _ = text.value()
        if text.skip() != ":":
            raise text.fault("a colon is expected")
        text.at += 1
        if key == "instances":
            found = True
            if kind is None:
                raise RowProblem("instances stands before type.", "Put type first, as LMFlow does.")
            if kind not in LMFLOW_TYPES:
                raise RowProblem(f"type {kind!r} is unknown.", nearest(str(kind), LMFLOW_TYPES))
            if text.skip() != "[":
                raise RowProblem("instances is not a list.", expected)
            yield from _array(text, LMFLOW_TYPES[kind])
        else:
            value, _, _ = text.value()
            kind = value if key == "type" else kind
    text.at += 1
    if text.skip():
        raise text.fault("nothing is expected after the document")
    if not found:
        raise RowProblem("is not an LMFlow dataset: it has no instances.", expected)


def _read_table(delimiter: str) -> Callable[[str], Iterator[RawRow]]:
    def read(path: str) -> Iterator[RawRow]:
        csv.field_size_limit(MAX_ROW_BYTES)
        with open_bytes(path) as stream:
            rows = csv.reader(
                io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), delimiter=delimiter, strict=True
            )
            try:
                names = next(rows, None)
                if names is None:
                    return
                if len(set(names)) != len(names):
                    raise RowProblem("two columns have the same name.", "Rename one.")
                index, before = -1, rows.line_num
                for values in rows:
                    line, before = before + 1, rows.line_num
                    if not values:
                        continue
                    index += 1
                    if len(values) != len(names):
                        yield RawRow(index, line, None, f"has {len(values)} values for {len(names)} columns.")
                    else:
                        yield RawRow(index, line, json.dumps(dict(zip(names, values, strict=True)), ensure_ascii=False))
            except csv.Error as error:
                raise RowProblem(f"line {rows.line_num}: {error}.") from None

    return read


def _read_text(path: str) -> Iterator[RawRow]:
    """Each line that is not blank is a text."""
    for row in _read_lines(path):
        yield row if row.text is None else RawRow(row.index, row.line, json.dumps({"text": row.text}))


def _read_parquet(path: str) -> Iterator[RawRow]:
    import pyarrow as pa

    with open_random_access(path) as stream:
        try:
            yield from _arrow_rows(parquet_batches(stream))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:  # Arrow's name for an encoding it does not read
            raise RowProblem(f"is not a readable Parquet file: {str(error).splitlines()[0]}") from None


def _read_arrow(path: str) -> Iterator[RawRow]:
    import pyarrow as pa

    with open_random_access(path) as stream:
        try:
            yield from _arrow_rows(_record_batches(stream))
        except pa.ArrowInvalid as error:
            raise RowProblem(f"is not a readable Arrow file: {str(error).splitlines()[0]}") from None


def _record_batches(stream: Any) -> Iterator[Any]:
    """Of a file in Arrow's streaming or random-access format. Raises pa.ArrowInvalid."""
    import pyarrow as pa

    try:
        batches = iter(pa.ipc.open_stream(stream))
    except pa.ArrowInvalid:
        stream.seek(0)
        file = pa.ipc.open_file(stream)
        batches = (file.get_batch(number) for number in range(file.num_record_batches))
    yield from batches


def _arrow_rows(batches: Any) -> Iterator[RawRow]:
    index = 0
    for batch in batches:
        rows = 64 if batch.nbytes <= MAX_ROW_BYTES else 1
        for start in range(0, batch.num_rows, rows):
            part = batch.slice(start, rows)
            if part.nbytes > MAX_ROW_BYTES and rows == 1:
                yield RawRow(index, 0, None, _too_long())
                index += 1
                continue
            for row in part.to_pylist():
                yield _as_json(index, row)
                index += 1


def _as_json(index: int, row: dict[str, Any]) -> RawRow:
    """A row of a columnar file. Structs there hold null for each key that a row lacks: such keys are left out."""
    try:
        text = json.dumps(
            {key: _without_nulls(value) for key, value in row.items()}, ensure_ascii=False, allow_nan=False
        )
    except (TypeError, ValueError) as error:
        return RawRow(index, 0, None, f"holds a value that JSON has not: {error}.")
    if len(text) > MAX_ROW_BYTES:
        return RawRow(index, 0, None, _too_long())
    return RawRow(index, 0, text)


def _too_long() -> str:
    return f"is longer than {MAX_ROW_BYTES // 2**20} MiB. Split or remove it."


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None or key == "content"}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value


def _read_hub(path: str, options: ReadOptions) -> Iterator[RawRow]:
    """A dataset of the Hugging Face hub, `hf://org/name`, or a local folder in its layout, through `datasets`."""
    import datasets

    try:
        dataset = datasets.load_dataset(
            path.removeprefix("hf://"),
            options.config,
            split=options.split,
            revision=options.revision,
            streaming=options.streaming,
        )
        for index, row in enumerate(dataset):
            yield _as_json(index, row)
    except (FileNotFoundError, ConnectionError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise RowProblem(f"cannot be loaded: {next(iter(str(error).splitlines()), type(error).__name__)}") from None


READERS: dict[str, Callable[[str], Iterator[RawRow]]] = {
    ".json": _read_json,
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".csv": _read_table(","),
    ".tsv": _read_table("\t"),
    ".txt": _read_text,
}
"""Ending of a file -> how it is read."""
