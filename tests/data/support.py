"""What the data tests share."""

import threading
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from raylm.data.readers import RawRow
from raylm.data.store import raw_table
from raylm.data.templates import chat_template
from raylm.data.tokenize import FileOptions, RowTokenizer, TokenizeOptions


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def bot(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def chat(*contents: str) -> dict[str, Any]:
    """A conversation of user and assistant in turn."""
    return {"messages": [(user, bot)[place % 2](text) for place, text in enumerate(contents)]}


def rows_of(tokenizer: Any, template: str = "auto", form: str = "auto", **options: Any) -> RowTokenizer:
    files = [FileOptions(form, {}, chat_template(template, tokenizer, "m"))]
    return RowTokenizer(tokenizer, TokenizeOptions(**{"max_seq_len": 512, **options}), files)


def table_of(texts: list[str | None]) -> pa.Table:
    """Raw rows of one file, None for a row whose fault was found while reading."""
    rows = [RawRow(place, place + 1, text, "" if text else "is broken.") for place, text in enumerate(texts)]
    return raw_table(0, [(row, "" if row.text else "malformed") for row in rows])


def at_once(work: Callable[[], None], count: int = 4) -> None:
    """Does the work in so many threads, and waits for all."""
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
