"""Any dataset as LMFlow JSON, OpenAI JSON Lines or Parquet. A row that cannot be read stops the conversion."""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from raylm.config.data import DataSection
from raylm.data.rows import iterate_rows
from raylm.errors import DataError

TARGETS = {".json": "LMFlow", ".jsonl": "OpenAI", ".parquet": "Parquet"}
_LMFLOW_TYPE = {"conversation": "conversation", "text": "text_only", "text2text": "text2text"}


def convert(section: DataSection, target: Path) -> int:
    """Writes all rows of data.train to `target`, complete or not at all; its ending names the format.

    Returns the number of rows. Raises DataError for faulty rows and for rows of several kinds.
    """
    if target.suffix not in TARGETS:
        raise DataError(str(target), "has an unknown ending.", f"Use one of {', '.join(TARGETS)}.")
    if target.exists():
        raise DataError(str(target), "exists.", "Remove it, or choose another name.")
    rows = [(kind, _plain(kind, value)) for kind, value in _checked(section)]
    kinds = {kind for kind, _ in rows}
    if not rows:
        raise DataError(section.train[0].path, "holds no rows.", "Check the path.")
    if len(kinds) > 1:
        raise DataError("data.train", f"holds rows of kinds {', '.join(sorted(kinds))}.", "Convert one kind at a time.")
    values = [value for _, value in rows]
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        if target.suffix == ".json":
            document = {"type": _LMFLOW_TYPE[kinds.pop()], "instances": values}
            scratch.write_text(json.dumps(document, ensure_ascii=False, indent=1), encoding="utf-8")
        elif target.suffix == ".jsonl":
            lines = [json.dumps(value, ensure_ascii=False) + "\n" for value in values]
            scratch.write_text("".join(lines), encoding="utf-8", newline="\n")
        else:
            _write_parquet(values, scratch)
        scratch.replace(target)
    except OSError as error:
        raise DataError(str(target), f"cannot be written: {error.strerror}.") from None
    finally:
        with suppress(OSError):
            scratch.unlink()
    return len(rows)


def _checked(section: DataSection) -> Iterator[tuple[str, Any]]:
    for found in iterate_rows(section.train, section.role_map):
        if found.row is None:
            raise DataError(found.where, found.problem)
        if found.row.kind not in _LMFLOW_TYPE:
            raise DataError(found.where, f"is a row of kind {found.row.kind}, which cannot be converted yet.")
        yield found.row.kind, found.row.value


def _plain(kind: str, value: Any) -> dict[str, Any]:
    if kind == "text":
        return {"text": value}
    if kind == "text2text":
        return {"input": value[0], "output": value[1]}
    return dict(value)


def _write_parquet(values: list[dict[str, Any]], target: Path) -> None:
    """Tools and calls as JSON text: columns would give every object the keys of all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if "messages" in values[0]:
        values = [_with_text_tools(value) for value in values]
    pq.write_table(pa.Table.from_pylist(values), target)


def _with_text_tools(value: dict[str, Any]) -> dict[str, Any]:
    messages = []
    for message in value["messages"]:
        calls = [
            {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
            for call in message.get("tool_calls", ())
        ]
        messages.append({**message, "tool_calls": calls} if calls else message)
    tools = {"tools": json.dumps(value["tools"], ensure_ascii=False)} if value.get("tools") else {}
    return {"messages": messages, **tools}
