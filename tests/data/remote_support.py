"""The same rows in every format, and how tests put them into a bucket and read them."""

import gzip
import io
import json
import time
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from raylm.config.data import DataSection, SourceSection
from raylm.data.readers import read_rows
from raylm.data.sources import list_files
from raylm.errors import DataError

ROWS = [{"question": f"wie {number}?", "answer": "ja " * (1 + number % 3)} for number in range(20)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
TEXTS = [{"text": row["question"]} for row in ROWS]
LMFLOW = {"type": "text_only", "instances": TEXTS}
SECRET = "raylm-test-secret"


def _arrow_file(kind: str) -> bytes:
    table, sink = pa.Table.from_pylist(ROWS), io.BytesIO()
    if kind == "parquet":
        pq.write_table(table, sink)
    elif kind == "csv":
        pa.csv.write_csv(table, sink)
    else:
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


FORMATS = {
    "a.jsonl": (LINES, ROWS),
    "a.jsonl.gz": (gzip.compress(LINES), ROWS),
    "a.jsonl.zst": (pa.compress(LINES, codec="zstd", asbytes=True), ROWS),
    "a.json": (json.dumps(LMFLOW).encode(), TEXTS),
    "a.json.gz": (gzip.compress(json.dumps(LMFLOW).encode()), TEXTS),
    "a.parquet": (_arrow_file("parquet"), ROWS),
    "a.arrow": (_arrow_file("arrow"), ROWS),
    "a.csv": (_arrow_file("csv"), ROWS),
    "a.txt": ("\n".join(row["text"] for row in TEXTS).encode(), TEXTS),
}


def put(bucket: Any, key: str, body: bytes = LINES) -> None:
    bucket.put_object(Key=key, Body=body)


def read(*sources: Any) -> list[Any]:
    section = DataSection.model_validate({"train": list(sources)})
    return [row for file in list_files(section.train) for row in read_rows(file.path, file.options)]


def paths(path: str) -> list[str]:
    return [file.path for file in list_files([SourceSection(path=path)])]


def values_of(rows: list[Any]) -> list[Any]:
    assert not [row.problem for row in rows if row.text is None]
    return [json.loads(row.text) for row in rows]


def stopped_by(path: str, within_s: float = 45) -> str:
    started = time.monotonic()
    with pytest.raises(DataError) as fault:
        paths(path)
    assert time.monotonic() - started < within_s
    message = str(fault.value)
    assert SECRET not in message
    assert "\n" not in message
    return message
