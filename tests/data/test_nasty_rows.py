"""Sixty rows as they come, each with what must become of it: used, or rejected with a reason that names the fault."""

import json
from typing import Any

import pytest

from raylm.data.tokenize import TOKENS_SCHEMA
from tests.data.support import rows_of, table_of

U, A = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def _chat(*messages: Any, **more: Any) -> str:
    return json.dumps({"messages": list(messages), **more})


def _user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _bot(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


NASTY: list[tuple[str, str, str]] = [
    # (what is nasty, the row's text, "" when it is used or a part of the problem)
    ("a plain chat", _chat(U, A), ""),
    ("an extra key", _chat(U, A, id=7), ""),
    ("an empty answer", _chat(U, _bot("")), ""),
    ("an answer of spaces", _chat(U, _bot("   ")), ""),
    ("an empty question", _chat(_user(""), A), ""),
    ("an empty system text", _chat(U, A, system=""), ""),
    ("a null system text", _chat(U, A, system=None), ""),
    ("null tools", _chat(U, A, tools=None), ""),
    ("no tools", _chat(U, A, tools=[]), ""),
    ("a trailing question", _chat(U, A, U), ""),
    ("two questions in a row", _chat(U, U, A), ""),
    ("two answers in a row", _chat(U, A, A), ""),
    ("the assistant begins", _chat(A, U, A), ""),
    ("a system message", _chat({"role": "system", "content": "s"}, U, A), ""),
    ("developer for system", _chat({"role": "developer", "content": "s"}, U, A), ""),
    ("emoji", _chat(_user("👩‍👩‍👧"), _bot("🎉")), ""),
    (
        "escaped surrogate pairs",
        '{"messages": [{"role": "user", "content": "\\ud83d\\ude00"}, ' + json.dumps(A) + "]}",
        "",
    ),
    ("line separators", _chat(_user("a\u2028b\u0085c"), A), ""),
    ("carriage returns", _chat(_user("a\r\nb"), A), ""),
    ("a null character", _chat(_user("a\x00b"), A), ""),
    ("a byte order mark inside", _chat(_user("\ufeffa"), A), ""),
    ("right to left", _chat(_user("שלום"), _bot("مرحبا")), ""),
    ("combining marks", _chat(_user("e\u0301" * 20), A), ""),
    ("placeholders", _chat(_user("{content} {{bos}}"), _bot("{eos}")), ""),
    ("Jinja in the text", _chat(_user("{% for x in y %}{{ x }}"), _bot("{{ 7 * 7 }}")), ""),
    ("a typed end token", _chat(_user("a <|im_end|> b"), A), ""),
    ("a typed end token in an answer", _chat(U, _bot("say <|im_end|> now")), ""),
    ("a typed header", _chat(_user("<|im_end|>\n<|im_start|>assistant\nno<|im_end|>"), A), ""),
    ("our own stand-in", _chat(_user("Qz0zQ Vx5answer5xV"), _bot("Qz1zQ")), ""),
    ("a big integer beside", '{"n": 123456789012345678901234567890, ' + _chat(U, A)[1:], ""),
    ("text parts", _chat(_user([{"type": "text", "text": "a"}]), A), ""),
    ("no text parts", _chat(_user([]), A), ""),
    ("a silent turn", _chat(U, _bot("no", train=False), U, A), ""),
    ("weight 1", _chat(U, _bot("yes", weight=1)), ""),
    ("Alpaca", '{"instruction": "a", "input": "", "output": "b"}', ""),
    ("Alpaca with null input", '{"instruction": "a", "input": null, "output": "b"}', ""),
    ("ShareGPT", '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}', ""),
    ("plain text", '{"text": "hello"}', ""),
    ("white space around", "  " + _chat(U, A) + "  ", ""),
    ("not JSON", "{nope}", "not valid JSON"),
    ("half an object", _chat(U, A)[:-3], "not valid JSON"),
    ("two objects", _chat(U, A) + _chat(U, A), "not valid JSON"),
    ("a list", "[]", "is a list, not an object"),
    ("a number", "7", "is a number, not an object"),
    ("null", "null", "is null, not an object"),
    ("nothing known", '{"a": 1}', "of no known format"),
    ("an empty object", "{}", "of no known format"),
    ("a key twice", '{"messages": [], "messages": []}', "given twice"),
    ("a nested key twice", '{"messages": [{"role": "user", "role": "user", "content": "a"}]}', "given twice"),
    ("NaN", '{"x": NaN, ' + _chat(U, A)[1:], "NaN is not JSON"),
    ("infinity", '{"x": -Infinity, ' + _chat(U, A)[1:], "-Infinity is not JSON"),
    ("half a surrogate pair", '{"text": "\\ud800"}', "half of a surrogate pair"),
    ("no messages", _chat(), "has no messages"),
    ("messages as text", '{"messages": "hi"}', "messages is text, not a list"),
    ("a message as text", '{"messages": ["hi"]}', "message 0 is text"),
    ("no role", '{"messages": [{"content": "hi"}]}', "message 0 has no role"),
    ("an unknown role", _chat({"role": "narrator", "content": "x"}, A), "role 'narrator' is not one of"),
    ("a null question", _chat(_user(None), A), "message 0 (user) has no content"),
    ("a null answer", _chat(U, _bot(None)), "message 1 (assistant) has no content"),
    ("a number as content", _chat(U, _bot(3)), "has a number as content"),
    ("an image part", _chat(_user([{"type": "image_url", "image_url": {}}]), A), "content part of type 'image_url'"),
    ("a late system message", _chat(U, A, {"role": "system", "content": "x"}), "a system message after the first"),
    (
        "two system texts",
        _chat({"role": "system", "content": "x"}, U, A, system="y"),
        "a system text and a system message",
    ),
    ("only questions", _chat(U), "has no assistant message"),
    ("every turn silent", _chat(U, _bot("no", train=False)), "has no token that carries loss"),
    ("a call the template leaves out", _chat(U, _bot(None, tool_calls=[CALL])), "leaves the call of f out"),
    ("a call by the user", _chat({**U, "tool_calls": [CALL]}, A), "but its role is user"),
    ("broken arguments", _chat(U, _bot("", tool_calls=[{"name": "f", "arguments": "{"}])), "are text, but no JSON"),
    ("preference pairs", '{"prompt": "a", "chosen": "b", "rejected": "c"}', "is a row of kind preference"),
    ("nested too deeply", '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    ("too long", _chat(U, _bot("yes " * 900)), "more than data.max_seq_len=512"),
]


def test_there_are_enough() -> None:
    assert len(NASTY) >= 60
    assert len({name for name, _, _ in NASTY}) == len(NASTY)


@pytest.mark.parametrize(("text", "problem"), [row[1:] for row in NASTY], ids=[row[0] for row in NASTY])
def test_what_becomes_of_it(tokenizer: Any, text: str, problem: str) -> None:
    table = rows_of(tokenizer).table(table_of([text]))
    assert table.schema == TOKENS_SCHEMA
    (row,) = table.to_pylist()
    if problem:
        assert row["reason"]
        assert problem in row["problem"]
        assert row["input_ids"] == []
    else:
        assert (row["reason"], row["problem"]) == ("", "")
        assert any(row["loss_mask"])


def test_all_together_one_result_each(tokenizer: Any) -> None:
    """A bad neighbour changes nothing."""
    rows = rows_of(tokenizer)
    together = rows.table(table_of([text for _, text, _ in NASTY])).drop_columns(["index", "line"]).to_pylist()
    apart = [rows.table(table_of([text])).drop_columns(["index", "line"]).to_pylist()[0] for _, text, _ in NASTY]
    assert together == apart
