import json
from pathlib import Path

import pytest

from raylm.data.sources import list_files, read_file
from raylm.errors import DataError

ROW = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
TEXT = json.dumps({"type": "conversation", "instances": [ROW, ROW]})


def test_folders_are_read_in_order_without_hidden_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.json", "a.json", ".hidden.json", "notes.txt", "sub/c.json"):
        (tmp_path / name).write_text(TEXT)
    assert [Path(f).name for f in list_files((str(tmp_path),))] == ["a.json", "b.json", "c.json"]


def test_missing_empty_unreadable_and_doubled_paths(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file or folder"):
        list_files((str(tmp_path / "absent.json"),))
    with pytest.raises(DataError, match=r"the folder holds no \.json files"):
        list_files((str(tmp_path),))
    file = tmp_path / "a.json"
    file.write_text(TEXT)
    with pytest.raises(DataError, match="is named twice"):
        list_files((str(file), str(tmp_path)))


@pytest.mark.parametrize("variant", [TEXT, "\ufeff" + TEXT, TEXT.replace(",", ",\r\n"), TEXT + "\n\n"])
def test_bom_crlf_and_blank_lines_change_nothing(tmp_path: Path, variant: str) -> None:
    """D15."""
    file = tmp_path / "a.json"
    file.write_bytes(variant.encode())
    rows = list(read_file(str(file), {}))
    assert [json.loads(row.conversation or "") for row in rows] == [ROW, ROW]


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_file_has_no_rows(tmp_path: Path, text: str) -> None:
    """Y03."""
    file = tmp_path / "a.json"
    file.write_text(text)
    assert list(read_file(str(file), {})) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"type": "conversation",\n "instances": [\n{]}', "line 3, column 2: not valid JSON"),
        ('{"type": "text_only", "instances": []}', "type 'text_only' is not supported; 'conversation' is."),
        ('{"instances": []}', "type None is not supported"),
        ("[1, 2]", "is not an LMFlow dataset."),
        ('{"type": "conversation", "instances": {}}', "instances is not a list."),
        ('{"type": "conversation", "type": "x", "instances": []}', "key 'type' is given twice in one object."),
        ('{"type": "conversation", "instances": [NaN]}', "NaN is not JSON."),
    ],
)
def test_a_fault_of_the_file_is_one_row(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(text)
    (row,) = read_file(str(file), {})
    assert row.index == -1
    assert row.problem.startswith(problem)


def test_bad_rows_keep_their_place(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"type": "conversation", "instances": [ROW, {"messages": []}, ROW]}))
    rows = list(read_file(str(file), {}))
    assert [(row.index, row.problem) for row in rows] == [(0, ""), (1, "has no messages."), (2, "")]


def test_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(b'{"type": "\xff"}')
    (row,) = read_file(str(file), {})
    assert row.problem.startswith("is not UTF-8 text (byte 10).")
