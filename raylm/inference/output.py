"""Files of answers: JSON Lines, plain or gzipped, and Parquet, each complete or absent."""

import gzip
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from raylm.data.remote import scheme_of
from raylm.errors import DataError

_ROWS_OF_A_GROUP = 1024
_FIRST_LINE_BYTES = 64 * 2**20


def kind_of_output(output: str) -> str:
    """`jsonl`, `jsonl.gz`, `parquet`, or `folder`. Raises DataError for another ending, and for an address."""
    if scheme_of(output):
        raise DataError(
            output, "is an address, and answers are written to local paths.", "Write to a folder, and copy that."
        )
    name = Path(output).name
    for kind in WRITERS:
        if name.endswith(f".{kind}"):
            return kind
    if output.endswith("/") or not Path(output).suffix or Path(output).expanduser().is_dir():
        return "folder"
    raise DataError(
        output, "has an unknown ending.", f"Use .{', .'.join(WRITERS)}, or a name that ends with / for a folder."
    )


def check_output(output: str) -> None:
    """What can be known of an output before anything is loaded. Raises DataError where it has no kind, or no file can
    be made there."""
    kind_of_output(output)
    path = Path(output).expanduser().absolute()
    if not path.parent.is_dir():
        raise DataError(str(path), "its folder does not exist.", "Create it, or choose another output.")
    try:
        with tempfile.TemporaryFile(dir=path if path.is_dir() else path.parent):
            pass
    except OSError as error:
        raise DataError(output, f"cannot be written: {error.strerror}.", "Choose another output.") from None


def write_answers(path: Path, kind: str, pieces: Iterable[bytes]) -> None:
    """Writes JSON Lines, given in pieces of whole lines, in their order. Raises DataError."""
    try:
        with _complete(path) as scratch:
            WRITERS[kind](scratch, pieces)
    except OSError as error:
        raise DataError(str(path), f"cannot be written: {error.strerror or error}.", "Free disk space.") from None


def holds_answers_to_prompts(path: Path, kind: str) -> bool:
    """Whether a file begins with an answer to a prompt of a command line, as `write_answers` writes it."""
    try:
        if kind == "parquet":
            import pyarrow.parquet as pq

            file = pq.ParquetFile(path)
            first = next(file.iter_batches(batch_size=1)).to_pylist()[0] if file.schema_arrow == _schema() else {}
        else:
            with gzip.open(path) if kind == "jsonl.gz" else path.open("rb") as stream:
                first = json.loads(stream.readline(_FIRST_LINE_BYTES))
    except Exception:  # whatever it is, it is not ours
        return False
    return (
        isinstance(first, dict)
        and first.get("file") is None
        and str(first.get("id")) == "0"
        and bool({"answer", "answers"} & set(first))
    )


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _complete(path: Path) -> Iterator[Path]:
    """A temporary name that becomes `path`, on the disk, when the block ends well."""
    # Whoever writes holds the lock of the answers, so what a kill leaves under this name is written over.
    scratch = path.with_name(f".{path.name}.partial")
    try:
        yield scratch
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())
        scratch.replace(path)
        sync_folder(path.parent)
    finally:
        with suppress(FileNotFoundError):
            scratch.unlink()


def _write_lines(path: Path, pieces: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)


def _write_gzip(path: Path, pieces: Iterable[bytes]) -> None:
    # No time and no name in the header: the same answers make the same file.
    with path.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as file:
        for piece in pieces:
            file.write(piece)


def _write_parquet(path: Path, pieces: Iterable[bytes]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema()
    with pq.ParquetWriter(path, schema) as writer:
        rows: list[dict[str, Any]] = []
        for piece in pieces:
            rows += [_columnar(json.loads(line)) for line in piece.split(b"\n") if line]
            if len(rows) >= _ROWS_OF_A_GROUP:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                rows = []
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def _columnar(row: dict[str, Any]) -> dict[str, Any]:
    """Ids as text; tools and arguments of calls as JSON text: columns would give every object the keys of all."""
    row = {**row, "id": str(row["id"])}
    if row.get("tools"):
        row["tools"] = json.dumps(row["tools"], ensure_ascii=False)
    if row.get("messages"):
        row["messages"] = [_columnar_message(message) for message in row["messages"]]
    return row


def _columnar_message(message: dict[str, Any]) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        written = json.dumps(function["arguments"], ensure_ascii=False)
        calls.append({"type": "function", "function": {"name": function["name"], "arguments": written}})
    return {**message, "tool_calls": calls}


def _schema() -> Any:
    """The same columns whatever the rows hold: a later row may have what the first ones lack."""
    import pyarrow as pa

    text, number = pa.string(), pa.int64()
    call = pa.struct([("type", text), ("function", pa.struct([("name", text), ("arguments", text)]))])
    message = pa.struct(
        [(name, text) for name in ("role", "content", "name", "tool_call_id", "reasoning")]
        + [("tool_calls", pa.list_(call))]
    )
    likely = pa.struct([("token", text), ("logprob", pa.float64())])
    logprobs = pa.list_(pa.struct([("token", text), ("logprob", pa.float64()), ("top", pa.list_(likely))]))
    answer = [("answer", text), ("finish_reason", text), ("tokens", number), ("logprobs", logprobs)]
    return pa.schema(
        [
            ("id", text),
            ("file", text),
            ("row", number),
            ("messages", pa.list_(message)),
            ("tools", text),
            ("prompt", text),
            *answer,
            ("prompt_tokens", number),
            ("answers", pa.list_(pa.struct(answer))),
            ("turns", pa.list_(pa.struct([*answer, ("prompt_tokens", number)]))),
            ("error", text),
            ("error_kind", text),
        ]
    )


WRITERS: dict[str, Callable[[Path, Iterable[bytes]], None]] = {
    "jsonl": _write_lines,
    "jsonl.gz": _write_gzip,
    "parquet": _write_parquet,
}
"""Ending -> how it is written."""
