import json
from pathlib import Path

import pytest

from raylm.config.data import SourceSection
from raylm.data.rows import check_first_rows
from raylm.data.sources import list_files
from raylm.errors import DataError

ROW = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
TEXT = json.dumps({"type": "conversation", "instances": [ROW, ROW]})


def _files(*paths: object) -> list[str]:
    return [Path(file.path).name for file in list_files([SourceSection(path=str(path)) for path in paths])]


def test_folders_are_read_in_order_without_hidden_files(tmp_path: Path) -> None:
    """Y03."""
    (tmp_path / "sub").mkdir()
    for name in ("b.json", "a.jsonl", ".hidden.json", "_tmp.json", "notes.md", "sub/c.parquet", "d.csv"):
        (tmp_path / name).write_text(TEXT)
    assert _files(tmp_path) == ["a.jsonl", "b.json", "d.csv", "c.parquet"]


def test_patterns(tmp_path: Path) -> None:
    for name in ("b.json", "a.json", "c.jsonl"):
        (tmp_path / name).write_text(TEXT)
    assert _files(tmp_path / "*.json") == ["a.json", "b.json"]
    with pytest.raises(DataError, match="the pattern matches no file"):
        _files(tmp_path / "*.csv")


def test_missing_empty_unknown_and_doubled_paths(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no such file or folder\. Check data\.train and data\.eval\.$"):
        _files(tmp_path / "absent.json")
    with pytest.raises(DataError, match="the folder holds no dataset files"):
        _files(tmp_path)
    with pytest.raises(DataError, match="addresses of kind ftp:// are not known"):
        _files("ftp://host/a.json")
    file = tmp_path / "a.json"
    file.write_text(TEXT)
    with pytest.raises(DataError, match="is named twice"):
        _files(file, tmp_path)
    with pytest.raises(DataError, match=r"format 'alpca' is unknown. Did you mean alpaca\?"):
        list_files([SourceSection(path=str(file), format="alpca")])


def test_a_dataset_saved_to_disk(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list([ROW, ROW]).save_to_disk(tmp_path / "saved")
    assert _files(tmp_path / "saved") == ["data-00000-of-00001.arrow"]
    datasets.DatasetDict({"train": datasets.Dataset.from_list([ROW])}).save_to_disk(tmp_path / "dict")
    with pytest.raises(DataError, match="holds several splits"):
        _files(tmp_path / "dict")


def test_the_first_row_of_each_dataset_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "good.json").write_text(TEXT)
    (tmp_path / "other.json").write_text(json.dumps({"name": "x", "questions": ["a"]}))
    (tmp_path / "late.jsonl").write_text(json.dumps(ROW) + "\n{}\n")
    (tmp_path / "empty.jsonl").write_text("")

    def check(*names: str) -> None:
        check_first_rows(list_files([SourceSection(path=str(tmp_path / name)) for name in names]), {})

    check("good.json", "late.jsonl", "empty.jsonl")  # a later row is seen when all are read
    with pytest.raises(DataError, match=r"other.json: instance 0 \(line 1\): has keys \(name, questions\) of no known"):
        check("good.json", "other.json")
