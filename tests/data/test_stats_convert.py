import json
from pathlib import Path
from typing import Any

import pytest

from raylm.config.data import DataSection
from raylm.data.convert import convert
from raylm.data.preview import preview_rows
from raylm.data.rows import iterate_rows
from raylm.data.stats import data_stats
from raylm.data.store import TokenizerSource
from raylm.errors import DataError
from tests.data.support import bot, call, chat, result, user

TOOLS = [{"name": "f", "parameters": {"z": 1, "a": {"y": "é"}}}, {"name": "g"}]
ROWS = [
    {"messages": [user("q"), bot("", tool_calls=[call("f", b=1, a=[2])]), result("3"), bot("done")], "tools": TOOLS},
    {"messages": [{"role": "system", "content": "s"}, *chat("a\u2028", "b")["messages"]]},
]


def _section(path: Path, **more: Any) -> DataSection:
    return DataSection.model_validate({"train": str(path), "max_seq_len": 64, **more})


def _written(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".parquet"])
def test_conversions_keep_every_value(tmp_path: Path, ending: str) -> None:
    """D14: through each format and back, tool schemas keep their keys and order."""
    source = _written(tmp_path / "a.jsonl", *ROWS)
    target = tmp_path / f"b{ending}"
    assert convert(_section(source), target) == 2
    back = [found.row.value for found in iterate_rows(_section(target).train, {}) if found.row]
    assert back == [found.row.value for found in iterate_rows(_section(source).train, {}) if found.row]
    assert json.dumps(back[0]["tools"]) == json.dumps(TOOLS)


def test_conversions_that_cannot_be(tmp_path: Path) -> None:
    source = _written(tmp_path / "a.jsonl", ROWS[1], {"text": "x"})
    with pytest.raises(DataError, match="holds rows of kinds conversation, text"):
        convert(_section(source), tmp_path / "b.json")
    with pytest.raises(DataError, match="has an unknown ending"):
        convert(_section(source), tmp_path / "b.xml")
    with pytest.raises(DataError, match=r"a\.jsonl: line 2: column 2: not valid JSON"):
        convert(_section(_written(tmp_path / "a.jsonl", ROWS[1], "{")), tmp_path / "b.json")
    assert not list(tmp_path.glob("*b.json*"))


def test_stats_count_everything(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = [chat("hello", "yes"), chat("hello", "yes"), chat("hello", "yes " * 80), "{", chat("world", "the answer")]
    source = _written(tmp_path / "a.jsonl", *rows)
    stats = data_stats(
        _section(source), TokenizerSource(str(tiny_model_dir), "tiny"), histogram=tmp_path / "lengths.png"
    )
    assert (stats.rows, stats.used, stats.rejected) == (5, 3, {"too_long": 1, "malformed": 1})
    assert stats.duplicates == 1
    assert stats.duplicate_examples == [(f"{source}: line 2", f"{source}: line 1")]
    assert 0 < stats.loss_tokens < stats.tokens
    assert stats.packed_rows >= 1
    assert stats.padding == pytest.approx(1 - stats.tokens / (64 * stats.packed_rows), abs=1e-4)
    assert stats.longest[0][0] == f"{source}: line 5"
    assert (tmp_path / "lengths.png").stat().st_size > 1000


def test_previews_show_rows_and_problems(tiny_model_dir: Path, tmp_path: Path) -> None:
    source = _written(tmp_path / "a.jsonl", chat("hello", "yes"), "{", {"messages": [user("x")]})
    rows = list(preview_rows(_section(source), TokenizerSource(str(tiny_model_dir), "tiny"), count=5))
    assert [bool(row.problem) for row in rows] == [False, True, True]
    assert "".join(text for _, text, loss in rows[0].tokens if loss) == "yes<|im_end|>"
    assert rows[1].where == f"{source}: line 2"
