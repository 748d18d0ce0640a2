"""Pages as their headers say, batches of a bounded size, and the memory of a process that reads nasty files."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylm.data import parquet
from raylm.data.parquet import parquet_batches
from raylm.data.readers import read_rows
from raylm.data.schema import RowProblem

MIB = 2**20


@pytest.mark.parametrize(
    "options", [{}, {"compression": "zstd"}, {"data_page_version": "2.0"}, {"use_dictionary": False}]
)
@pytest.mark.parametrize("batch", [7, 1024])
def test_all_pages_are_found(tmp_path: Path, options: dict[str, Any], batch: int) -> None:
    """Their values add up to those of the column, also with page indexes, checksums, statistics and nesting."""
    rows = [
        {"text": f"{number} " * 40, "tags": ["a", str(number)] * (number % 4), "n": number} for number in range(3000)
    ]
    file = tmp_path / "a.parquet"
    pq.write_table(
        pa.Table.from_pylist(rows),
        file,
        **options,
        data_page_size=4096,
        write_batch_size=batch,
        write_page_index=batch == 7,
        write_page_checksum=batch == 7,
        row_group_size=2000,
    )
    with pa.OSFile(str(file)) as stream:
        metadata = pq.ParquetFile(stream).metadata
        for group in (metadata.row_group(number) for number in range(metadata.num_row_groups)):
            for column in (group.column(number) for number in range(group.num_columns)):
                pages = list(parquet._pages(stream, column))
                assert sum(page.num_values for page in pages if not page.is_dictionary) == column.num_values
                assert sum(page.num_bytes for page in pages) <= column.total_uncompressed_size
                assert any(page.is_dictionary for page in pages) == column.has_dictionary_page
    assert [row.index for row in read_rows(str(file))] == list(range(3000))


def test_batches_hold_as_many_rows_as_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value of the dictionary is as long in each row that has it."""
    monkeypatch.setattr(parquet, "_BATCH_BYTES", 10_000)
    monkeypatch.setattr(parquet, "_SMALL_CHUNK_BYTES", 1000)
    monkeypatch.setattr(parquet, "_SMALL_DICTIONARY_BYTES", 1000)
    for texts, dictionary, rows in (
        (["x" * 2000] * 40, True, 4),
        (["x" * 2000] * 40, False, 4),
        (["x"] * 200, True, 64),
        (["x" * 90_000] * 3, True, 1),
    ):
        pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", use_dictionary=dictionary)
        with pa.OSFile(str(tmp_path / "a.parquet")) as stream:
            assert next(parquet_batches(stream)).num_rows == rows
    monkeypatch.setattr(parquet, "MAX_PAGE_BYTES", 10_000)
    with pa.OSFile(str(tmp_path / "a.parquet")) as stream, pytest.raises(RowProblem, match="smaller pages"):
        next(parquet_batches(stream))


def test_a_damaged_page_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_SMALL_CHUNK_BYTES", 0)
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet", use_dictionary=False)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    for damage in (b"\xff" * 12, b"\x00" * 12):
        content[4:16] = damage
        (tmp_path / "a.parquet").write_bytes(content)
        (row,) = read_rows(str(tmp_path / "a.parquet"))
        assert row.problem == "is not a readable Parquet file: a page header is damaged."


def _peak_growth_mib(path: Path) -> tuple[int, list[str]]:
    """What reading a file adds to the largest memory of a fresh process, and the problems found."""
    program = """
import sys
import pyarrow.parquet
from raylm.data.readers import read_rows
def peak():  # of this program alone; getrusage would count the one that started it
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) // 1024
before = peak()
problems = [row.problem for row in read_rows(sys.argv[1]) if row.text is None]
print(peak() - before, *problems, sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    growth, *problems = done.stdout.splitlines()
    return int(growth), problems


def _write_group(path: Path, num_mib: int, **options: Any) -> None:
    """One row group of rows of 1 MiB; 64 of them, again and again, so that writing does not hold it all."""
    texts = pa.array([f"{number:06}" + "y" * (MIB - 6) for number in range(64)])
    table = pa.table({"text": pa.chunked_array([texts] * (num_mib // 64))})
    pq.write_table(table, path, compression="zstd", use_dictionary=False, row_group_size=num_mib, **options)
    assert pq.ParquetFile(path).metadata.row_group(0).num_rows == num_mib


@pytest.mark.parametrize("kind", ["json_lines", "parquet", "plain_parquet"])
def test_a_row_of_200_mib_is_refused_within_bounds(tmp_path: Path, kind: str) -> None:
    file = tmp_path / ("a.jsonl.zst" if kind == "json_lines" else "a.parquet")
    if kind == "json_lines":
        with pa.CompressedOutputStream(str(file), "zstd") as sink:
            sink.write(b'{"text": "a"}\n{"text": "' + b"x" * (200 * MIB) + b'"}\n{"text": "b"}\n')
    else:
        table = pa.table({"text": ["a"] * 50 + ["x" * (200 * MIB)] + ["b"] * 50})
        pq.write_table(table, file, compression="zstd", use_dictionary=kind == "parquet")
    growth, problems = _peak_growth_mib(file)
    assert problems == ["is longer than 64 MiB. Split or remove it."]
    assert growth < (300 if kind == "json_lines" else 800)  # a row above the limit; the page and its copies


@pytest.mark.slow
def test_a_row_group_of_2_gib_is_read_in_pieces(tmp_path: Path) -> None:
    _write_group(tmp_path / "a.parquet", 2048, write_batch_size=8)
    growth, problems = _peak_growth_mib(tmp_path / "a.parquet")
    assert problems == []
    assert growth < 700


def test_a_large_page_is_refused_unread(tmp_path: Path) -> None:
    """pyarrow puts up to 1,024 rows into a page, however long they are."""
    _write_group(tmp_path / "a.parquet", 640, data_page_size=2**31 - 1)
    growth, problems = _peak_growth_mib(tmp_path / "a.parquet")
    assert growth < 100
    assert "is more than 512 MiB. Write the file with smaller pages" in problems[0]


@pytest.mark.slow
def test_a_value_that_many_rows_share_is_not_multiplied(tmp_path: Path) -> None:
    text = pa.array(["z" * (60 * MIB)], pa.large_string())
    pq.write_table(pa.table({"text": text.take(pa.array([0] * 8))}), tmp_path / "a.parquet", compression="zstd")
    growth, problems = _peak_growth_mib(tmp_path / "a.parquet")
    assert problems == []
    assert growth < 700
