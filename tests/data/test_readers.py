import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylm.data import readers
from raylm.data.readers import place_in_file, read_rows

ROW = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
TEXT = json.dumps({"type": "conversation", "instances": [ROW, ROW]})


def _read(tmp_path: Path, content: str | bytes, name: str) -> list[Any]:
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_rows(str(file)))


def _values(rows: list[Any]) -> list[Any]:
    return [json.loads(row.text) if row.text is not None else row.problem for row in rows]


@pytest.mark.parametrize("variant", [TEXT, "\ufeff" + TEXT, TEXT.replace(",", ",\r\n"), TEXT + "\n\n"])
def test_bom_crlf_and_blank_lines_change_nothing_in_json(tmp_path: Path, variant: str) -> None:
    """D15."""
    rows = _read(tmp_path, variant, "a.json")
    assert _values(rows) == [ROW, ROW]
    assert {row.format for row in rows} == {"conversation"}


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\n\n", "\n \n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_bom_crlf_and_blank_lines_change_nothing_in_json_lines(tmp_path: Path, ending: str, mark: str) -> None:
    """D15."""
    rows = _read(tmp_path, mark + ending.join([json.dumps(ROW), json.dumps({"text": "a\u2028b"})]) + ending, "a.jsonl")
    assert _values(rows) == [ROW, {"text": "a\u2028b"}]
    assert [row.index for row in rows] == [0, 1]


def test_unicode_line_separators_do_not_end_a_line(tmp_path: Path) -> None:
    rows = _read(tmp_path, json.dumps({"text": "a\u2028b\u0085c"}, ensure_ascii=False) + "\n", "a.jsonl")
    assert _values(rows) == [{"text": "a\u2028b\u0085c"}]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.txt"])
@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_file_has_no_rows(tmp_path: Path, text: str, name: str) -> None:
    """Y03."""
    if name != "a.csv" or not text:
        assert _read(tmp_path, text, name) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"type": "conversation",\n "instances": [\n{]}', "line 3, column 2: not valid JSON"),
        ('{"type": "conversatoin", "instances": []}', "type 'conversatoin' is unknown. Did you mean conversation?"),
        ('{"instances": [], "type": "conversation"}', "instances stands before type."),
        ('{"type": "conversation", "instances": {}}', "instances is not a list."),
        ('{"type": "conversation", "instances": [NaN]}', "line 1: NaN is not JSON."),
        ('[{"a": 1}\n {"a": 2}]', "line 2, column 2: not valid JSON: a comma"),
        ('[{"a": 1,\n "a": 2}]', "line 1: key 'a' is given twice in one object."),
        ("true", "line 1, column 1: not valid JSON: an object or a list is expected"),
        (TEXT + "x", "line 1, column"),
    ],
)
def test_a_fault_of_the_file_is_one_row(tmp_path: Path, text: str, problem: str) -> None:
    row = _read(tmp_path, text, "a.json")[-1]
    assert row.index == -1
    assert row.problem.startswith(problem)


def test_arrays_and_values_one_after_the_other(tmp_path: Path) -> None:
    rows = _read(tmp_path, '[{"a": 1},\n{"a": [2, {"b": 1}]}]', "a.json")
    assert (_values(rows), [row.line for row in rows]) == ([{"a": 1}, {"a": [2, {"b": 1}]}], [1, 2])
    rows = _read(tmp_path, '{"a": 1}\n\n{"a": 2}\n', "b.json")
    assert (_values(rows), [row.line for row in rows]) == ([{"a": 1}, {"a": 2}], [1, 3])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from("abc"), JSON, max_size=3), max_size=8), st.integers(1, 40))
def test_a_file_in_small_chunks_reads_as_json_does(rows: list[Any], chunk: int) -> None:
    """Big integers, nesting and any text survive exactly, wherever a chunk ends."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_CHUNK_CHARS", chunk)
        array = _read(Path(folder), json.dumps(rows, indent=1), "a.json")
        lines = _read(Path(folder), "\n".join(map(json.dumps, rows)), "a.jsonl")
    assert _values(array) == rows
    assert _values(lines) == rows


def test_a_row_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded by the longest row."""
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 2**20)
    long, short = json.dumps({"text": "x" * 2**21}), json.dumps({"text": "y"})
    rows = _read(tmp_path, "\n".join([short, long, short]), "a.jsonl")
    assert [row.problem[:23] for row in rows] == ["", "is longer than 1 MiB. S", ""]
    assert [row.line for row in rows] == [1, 2, 3]
    row = _read(tmp_path, f"[{short},\n{long}{long}]", "a.json")[-1]
    assert row.problem.startswith("line 2: a row is longer than 1 MiB")


def test_tables_keep_text_as_it_is(tmp_path: Path) -> None:
    rows = _read(tmp_path, '\ufeffquestion,answer\n"a, ""b""\nc",007\nx\n\ny,z\n', "a.csv")
    assert _values(rows) == [
        {"question": 'a, "b"\nc', "answer": "007"},
        "has 1 values for 2 columns.",
        {"question": "y", "answer": "z"},
    ]
    assert [row.line for row in rows] == [2, 4, 6]
    assert _values(_read(tmp_path, "q\ta\n1\t2\n", "a.tsv")) == [{"q": "1", "a": "2"}]
    assert _read(tmp_path, "q,q\n1,2\n", "b.csv")[0].problem.startswith("two columns have the same name")


def test_plain_text_is_a_row_a_line(tmp_path: Path) -> None:
    assert _values(_read(tmp_path, "one\n\n two \n", "a.txt")) == [{"text": "one"}, {"text": "two"}]


def test_compressed_files(tmp_path: Path) -> None:
    text = (json.dumps(ROW) + "\n").encode()
    assert _values(_read(tmp_path, gzip.compress(text), "a.jsonl.gz")) == [ROW]
    assert _values(_read(tmp_path, gzip.compress(TEXT.encode()), "a.json.gz")) == [ROW, ROW]
    packed = pa.compress(text, codec="zstd", asbytes=True)
    assert _values(_read(tmp_path, packed, "a.jsonl.zst")) == [ROW]
    assert _read(tmp_path, b"no gzip", "b.jsonl.gz")[0].problem.startswith("cannot be read")


def test_columnar_files(tmp_path: Path) -> None:
    """D14, D17: keys that a row lacks do not come back as nulls, and big integers stay whole."""
    tools = [
        {"name": "a", "parameters": {"x": {"type": "string"}}},
        {"name": "b", "parameters": {"y": {"type": "int"}}},
    ]
    table = pa.Table.from_pylist([{"tools": [tool], "n": 2**62, "url": None} for tool in tools])
    pq.write_table(table, tmp_path / "a.parquet")
    rows = list(read_rows(str(tmp_path / "a.parquet")))
    assert [value["tools"] for value in _values(rows)] == [[tools[0]], [tools[1]]]
    assert _values(rows)[0]["n"] == 2**62
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as sink:
        sink.write_table(table)
    assert _values(list(read_rows(str(tmp_path / "a.arrow")))) == _values(rows)
    (row,) = _read(tmp_path, b"PAR1 nonsense", "b.parquet")
    assert row.problem.startswith("is not a readable Parquet file")


def test_not_utf8(tmp_path: Path) -> None:
    (row,) = _read(tmp_path, b'{"type": "\xff"}', "a.json")
    assert row.problem.startswith("is not UTF-8 text")
    rows = _read(tmp_path, b'{"a": 1}\n{"b": "\xff"}\n{"c": 1}', "a.jsonl")
    assert [row.line for row in rows if row.text is None] == [2]


def test_a_local_folder_in_the_layout_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "a"}) + "\n" + json.dumps({"text": "b"}) + "\n")
    assert _values(list(read_rows(f"hf://{tmp_path}"))) == [{"text": "a"}, {"text": "b"}]
    (row,) = read_rows(f"hf://{tmp_path}", readers.ReadOptions(split="absent"))
    assert row.problem.startswith("cannot be loaded")


def test_places() -> None:
    assert place_in_file("a.jsonl.gz", 2, 7) == "a.jsonl.gz: line 7"
    assert place_in_file("a.json", 2, 7) == "a.json: instance 2 (line 7)"
    assert place_in_file("a.parquet", 2, 0) == "a.parquet: row 2"
    assert place_in_file("a.json", -1, 0) == "a.json"
