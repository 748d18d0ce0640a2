from typing import Any

import pytest

from raylm.data.formats import FORMATS, LMFLOW_TYPES, ParsedRow, parse_row
from raylm.data.schema import RowProblem
from tests.data.support import bot, call, chat, user

HI = chat("hi", "yes")
ROWS: list[tuple[str, dict[str, Any], ParsedRow]] = [
    ("conversation", HI, ParsedRow("conversation", HI)),
    (
        "sharegpt",
        {
            "system": "s",
            "tools": '[{"name": "f"}]',
            "conversations": [
                {"from": "human", "value": "hi"},
                {"from": "function_call", "value": "f()"},
                {"from": "observation", "value": "3"},
                {"from": "gpt", "value": "yes"},
            ],
        },
        ParsedRow(
            "conversation",
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    user("hi"),
                    bot("f()"),
                    {"role": "tool", "content": "3"},
                    bot("yes"),
                ],
                "tools": [{"name": "f"}],
            },
        ),
    ),
    (
        "alpaca",
        {"instruction": "add", "input": "1 2", "output": "3", "history": [["a", "b"]], "system": "s"},
        ParsedRow(
            "conversation",
            {"messages": [{"role": "system", "content": "s"}, *chat("a", "b", "add\n1 2", "3")["messages"]]},
        ),
    ),
    ("alpaca", {"instruction": "hi", "input": "", "output": "yes"}, ParsedRow("conversation", HI)),
    ("prompt_completion", {"prompt": "hi", "completion": " yes"}, ParsedRow("text2text", ("hi", " yes"))),
    (
        "prompt_completion",
        {"prompt": [user("hi")], "completion": [bot("yes")]},
        ParsedRow("conversation", HI),
    ),
    ("prompt_response", {"prompt": "hi", "response": "yes"}, ParsedRow("conversation", HI)),
    ("question_answer", {"question": "hi", "answer": "yes"}, ParsedRow("conversation", HI)),
    ("text2text", {"input": "hi", "output": "yes"}, ParsedRow("text2text", ("hi", "yes"))),
    ("text", {"text": "hi"}, ParsedRow("text", "hi")),
    (
        "preference",
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": "b"},
        ParsedRow("preference", {"prompt": [user("q")], "chosen": [bot("a")], "rejected": [bot("b")]}),
    ),
    (
        "preference",
        {"chosen": chat("q", "a"), "rejected": chat("q", "b")},
        ParsedRow("preference", {"prompt": [user("q")], "chosen": [bot("a")], "rejected": [bot("b")]}),
    ),
    (
        "paired_text_to_text",
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        ParsedRow("preference", {"prompt": [user("q")], "chosen": [bot("a")], "rejected": [bot("b")]}),
    ),
    (
        "kto",
        {"prompt": "q", "completion": "a", "label": False},
        ParsedRow("kto", {"prompt": [user("q")], "completion": [bot("a")], "label": False}),
    ),
    (
        "kto_messages",
        {**chat("q", "a"), "label": True},
        ParsedRow("kto", {"prompt": [user("q")], "completion": [bot("a")], "label": True}),
    ),
    (
        "text_to_textlist",
        {"input": "q", "output": ["a", "b"]},
        ParsedRow("ranked", {"input": "q", "outputs": ["a", "b"]}),
    ),
    (
        "text_to_scored_textlist",
        {"input": "q", "output": [{"score": 1, "text": "a"}]},
        ParsedRow("scored", {"input": "q", "outputs": [(1.0, "a")]}),
    ),
    (
        "image_text",
        {"images": ["1.jpg"], "text": "a cat"},
        ParsedRow("image_text", {"images": ["1.jpg"], "text": "a cat"}),
    ),
]


@pytest.mark.parametrize(("name", "instance", "parsed"), ROWS)
def test_each_format(name: str, instance: dict[str, Any], parsed: ParsedRow) -> None:
    assert parse_row(instance, name, {}, {}) == parsed
    if name not in ("text_to_textlist", "text_to_scored_textlist"):
        assert parse_row(instance, "auto", {}, {}) == parsed


def test_every_format_is_tested_and_every_lmflow_type_is_known() -> None:
    assert {name for name, _, _ in ROWS} == set(FORMATS)
    assert set(LMFLOW_TYPES.values()) <= set(FORMATS)


def test_columns_are_mapped() -> None:
    row = {"problem": "hi", "solution": "yes", "text": "unused"}
    columns = {"question": "problem", "answer": "solution"}
    assert parse_row(row, "question_answer", {}, columns) == ParsedRow("conversation", HI)
    with pytest.raises(RowProblem, match="has no column 'problem', which columns names"):
        parse_row({"q": 1}, "auto", {}, columns)


@pytest.mark.parametrize(
    ("form", "instance", "problem"),
    [
        ("auto", [1], "is a list, not an object."),
        ("auto", {"a": 1, "b": 2}, "has keys (a, b) of no known format."),
        ("alpaca", {"instruction": "a"}, "has no output, which format alpaca needs."),
        ("auto", {"instruction": "a", "output": None}, "output is null, not text."),
        ("auto", {"instruction": "a", "output": "b", "history": [["x"]]}, "history 0 is not a pair"),
        ("auto", {"text": 3}, "text is a number, not text."),
        ("auto", {"text": "\ud800"}, "text holds half of a surrogate pair"),
        ("auto", {"conversations": []}, "has no conversations."),
        ("auto", {"conversations": [{"from": "cat", "value": "x"}]}, "role 'cat' is not one of"),
        ("auto", {"chosen": "a", "rejected": "b"}, "has no prompt: chosen and rejected share no first turn."),
        ("auto", {"prompt": "q", "chosen": [user("a")], "rejected": "b"}, "chosen does not end with the assistant."),
        ("auto", {**chat("q"), "label": True}, "does not end with the assistant"),
        ("auto", {"prompt": "q", "completion": "a", "label": 1}, "label is a number, not true or false."),
        ("text_to_textlist", {"input": "q", "output": "a"}, "output is text, not a list"),
        ("text_to_scored_textlist", {"input": "q", "output": [{"text": "a"}]}, "output 0 has no score."),
        ("auto", {"images": "a.jpg"}, "images is not a list of paths."),
        (
            "auto",
            {"messages": [user("q"), bot("", tool_calls=[call("f")])], "tools": "x"},
            "tools is text, but no JSON",
        ),
    ],
)
def test_faulty_rows_are_named(form: str, instance: Any, problem: str) -> None:
    with pytest.raises(RowProblem) as caught:
        parse_row(instance, form, {}, {})
    assert str(caught.value).startswith(problem)
