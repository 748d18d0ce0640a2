import json
from pathlib import Path

import pytest

from raylm.config.data import SourceSection
from raylm.data.texts import iterate_texts, read_token_list
from raylm.errors import DataError

ROWS = [
    ({"text": "plain"}, ["plain"]),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, ["q", "a"]),
    ({"instruction": "i", "input": "n", "output": "o", "system": "s"}, ["s", "i\nn", "o"]),
    ({"input": "n", "output": "o"}, ["n", "o"]),
    ({"prompt": "p", "chosen": "c", "rejected": "r"}, ["p", "c", "r"]),
    ({"prompt": "p", "completion": "c", "label": True}, ["p", "c"]),
    ({"images": ["a.png"], "text": "t"}, ["t"]),
]


@pytest.mark.parametrize(("row", "texts"), ROWS, ids=lambda value: "-".join(value))
def test_every_text_of_a_row_is_found(row: dict[str, object], texts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert list(iterate_texts([SourceSection(path=str(path))])) == texts


@pytest.mark.parametrize(
    ("kind", "outputs"), [("text_to_textlist", ["a", "b"]), ("text_to_scored_textlist", [{"score": 1, "text": "a"}])]
)
def test_texts_of_ranked_rows(kind: str, outputs: list[object], tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"type": kind, "instances": [{"input": "n", "output": outputs}]}))
    texts = [output["text"] if isinstance(output, dict) else output for output in outputs]
    assert list(iterate_texts([SourceSection(path=str(path))])) == ["n", *texts]


def test_a_faulty_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n{"text": 3}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl.*line 2"):
        list(iterate_texts([SourceSection(path=str(path))]))


def test_lists_of_tokens(tmp_path: Path) -> None:
    lines, listed = tmp_path / "t.txt", tmp_path / "t.json"
    lines.write_bytes("﻿foo bar\r\n\r\n<|act|>\r\nlast".encode())
    listed.write_text('["foo bar", "<|act|>", "last"]')
    assert read_token_list(lines) == read_token_list(listed) == ("foo bar", "<|act|>", "last")
    listed.write_text('{"a": 1}')
    with pytest.raises(DataError, match="is not a JSON list of strings"):
        read_token_list(listed)
    listed.write_text("[")
    with pytest.raises(DataError, match=r"t\.json:1: is not valid JSON"):
        read_token_list(listed)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_token_list(tmp_path / "absent.txt")
