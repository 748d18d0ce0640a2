"""The texts in rows of any format, one by one, and lists of tokens: what a vocabulary is learnt from."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from raylm.config.data import SourceSection
from raylm.data.formats import ParsedRow
from raylm.data.rows import iterate_rows
from raylm.errors import DataError


def iterate_texts(sources: Sequence[SourceSection]) -> Iterator[str]:
    """Every text in every row: messages, prompts, answers. Raises DataError for a file or row that cannot be read."""
    for found in iterate_rows(sources, {}):
        if found.row is None:
            raise DataError(found.where, found.problem)
        yield from row_texts(found.row)


def row_texts(row: ParsedRow) -> Iterator[str]:
    """The texts of one row, in the order they stand in it."""
    value: Any = row.value
    if row.kind == "text":
        yield value
    elif row.kind == "text2text":
        yield from value
    elif row.kind == "scored":
        yield value["input"]
        yield from (text for _, text in value["outputs"])
    else:
        for key in ("messages", "prompt", "completion", "chosen", "rejected"):
            yield from _message_texts(value.get(key, ()))
        yield from (value[key] for key in ("input", "text") if key in value)
        yield from value.get("outputs", ())


def read_token_list(path: Path) -> tuple[str, ...]:
    """The tokens of a file: a JSON list of strings (`.json`), or one a line. Raises DataError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise DataError(str(path), f"cannot be read: {reason}.", "Give a file with one token a line.") from None
    if path.suffix != ".json":
        return tuple(line for line in text.replace("\r\n", "\n").split("\n") if line)
    try:
        tokens = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}", f"is not valid JSON: {error.msg}.") from None
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise DataError(str(path), "is not a JSON list of strings.", 'Write ["one", "two"].')
    return tuple(tokens)


def _message_texts(messages: Any) -> Iterator[str]:
    for message in messages:
        yield from (message[key] for key in ("reasoning", "content") if message.get(key))
