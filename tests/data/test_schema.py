from typing import Any

import pytest

from raylm.data.schema import RowProblem, load_json, parse_conversation, parse_messages, parse_tools

USER = {"role": "user", "content": "hi"}
BOT = {"role": "assistant", "content": "hello"}


def test_the_system_text_becomes_the_first_message() -> None:
    instance = {"conversation_id": 7, "system": "Be brief.", "messages": [{"role": "user", "content": "ä\u2028ü"}, BOT]}
    conversation = parse_conversation(instance, {})
    assert [m["role"] for m in conversation["messages"]] == ["system", "user", "assistant"]
    assert conversation["messages"][1]["content"] == "ä\u2028ü"


def test_roles_of_other_formats() -> None:
    messages = [
        {"role": "developer", "content": "s"},
        {"role": "human", "content": "a"},
        {"role": "function", "content": "f()"},
        {"role": "observation", "content": "3"},
        {"role": "gpt", "content": "b"},
        {"role": "function", "name": "f", "content": "4"},
    ]
    roles = [m["role"] for m in parse_conversation({"messages": messages}, {})["messages"]]
    assert roles == ["system", "user", "assistant", "tool", "assistant", "tool"]


def test_text_parts_are_joined_and_calls_read() -> None:
    """Y04, D12: content as text or as parts; arguments as text or as an object."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    calls = [{"type": "function", "id": "1", "function": {"name": "f", "arguments": '{"city": "Orléans"}'}}]
    other = [{"name": "f", "arguments": {"city": "Orléans"}}]
    for given in (calls, other):
        row = {
            "messages": [
                {"role": "user", "content": parts},
                {"role": "assistant", "content": None, "tool_calls": given},
            ]
        }
        question, answer = parse_conversation(row, {})["messages"]
        assert question["content"] == "ab"
        assert answer["content"] == ""
        assert answer["tool_calls"] == [
            {"type": "function", "function": {"name": "f", "arguments": {"city": "Orléans"}}}
        ]


def test_tools_keep_keys_and_order() -> None:
    """D14."""
    tools = [{"name": "a", "parameters": {"z": 1, "b": None}}, {"name": "b"}]
    assert parse_tools(tools) == tools
    assert parse_tools('[{"z": 12345678901234567890, "a": {"y": 1}}]') == [{"z": 12345678901234567890, "a": {"y": 1}}]
    assert list(parse_tools('[{"z": 1, "a": 2}]')[0]) == ["z", "a"]


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"a": {"b": 1, "b": 1}}', "NaN", "[Infinity]"])
def test_what_json_has_not_is_refused(text: str) -> None:
    with pytest.raises(RowProblem):
        load_json(text)


def test_roles_are_mapped() -> None:
    row = {"messages": [{"role": "human", "content": "hi"}, {"role": "bot", "content": "x"}]}
    conversation = parse_conversation(row, {"human": "user", "bot": "assistant"})
    assert [m["role"] for m in conversation["messages"]] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("instance", "problem"),
    [
        ({}, "has no messages."),
        ({"messages": []}, "has no messages."),
        ({"messages": "hi"}, "messages is text, not a list."),
        ({"messages": ["hi"]}, "message 0 is text, not an object with role and content."),
        ({"messages": [{"content": "x"}]}, "message 0 has no role."),
        ({"messages": [{"role": "bot", "content": "x"}]}, "role 'bot' is not one of system, user, assistant, tool."),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "message 1 (assistant) has no content."),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, "message 1 (assistant) has a number as content."),
        (
            {"messages": [USER, BOT, {"role": "system", "content": "x"}]},
            "has a system message after the first message.",
        ),
        ({"system": 3, "messages": [USER, BOT]}, "system is a number, not text."),
        (
            {"system": "a", "messages": [{"role": "system", "content": "b"}, BOT]},
            "has a system text and a system message.",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": "\ud800"}]},
            "message 1 (assistant) holds half of a surrogate pair, which is not text.",
        ),
        ({"tools": {"name": "f"}, "messages": [USER, BOT]}, "tools is an object, not a list."),
        ({"messages": [USER, {**BOT, "train": "no"}]}, "message 1: train is text, not true or false."),
        ({"messages": [USER, {**BOT, "weight": 0.5}]}, "message 1: weight is 0.5, not 0 or 1."),
        ({"messages": [{**USER, "tool_calls": [1]}, BOT]}, "message 0 has tool_calls, but its role is user."),
        ({"messages": [{**BOT, "tool_calls": [{}]}]}, "message 0: a tool call has no function name."),
        (
            {"messages": [{**BOT, "tool_calls": [{"name": "f", "arguments": "x"}]}]},
            "message 0: the arguments of f are text, but no JSON: 'x'.",
        ),
        (
            {"messages": [{**BOT, "tool_calls": [{"name": "f", "arguments": "[1,2]"}]}]},
            "message 0: the arguments of f are a list, not an object.",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, BOT]},
            "message 0 (user) has a content part of type 'image_url'; only text can be trained on here.",
        ),
    ],
)
def test_malformed_instances_are_named(instance: Any, problem: str) -> None:
    with pytest.raises(RowProblem) as caught:
        parse_conversation(instance, {})
    assert caught.value.problem == problem


def test_the_remedy_for_an_unknown_role() -> None:
    with pytest.raises(RowProblem) as caught:
        parse_conversation({"messages": [{"role": "bot", "content": "x"}]}, {})
    assert caught.value.remedy == "Rename it, or set data.role_map={bot: assistant}."


@pytest.mark.parametrize(
    "text",
    ['{"a" : 1, "a":2}', '{"a": "x\\": ", "b": 1, "b": 2}', '{"a":\n{"b"\t:1,"b":2}}', '[{"a": "\\"b\\": 1", "a": 2}]'],
)
def test_a_key_given_twice_is_found_however_it_is_written(text: str) -> None:
    with pytest.raises(RowProblem, match="is given twice"):
        load_json(text)


@pytest.mark.parametrize(
    "text", ['{"a": "x\\": ", "b" : 1}', '{"a": {"a": [{"a": 1}, {"a": "\\"a\\":"}]}}', "[]", '"x"']
)
def test_text_that_looks_like_keys_changes_nothing(text: str) -> None:
    import json

    assert load_json(text) == json.loads(text)


def test_calls_in_a_turn_of_their_own_are_calls() -> None:
    """ShareGPT's function_call holds JSON; other text of that role stays text."""
    texts = [
        '{"name": "f", "arguments": {"a": 1}}',
        '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": "{\\"b\\": 2}"}]',
        "f(1)",
        '{"name": "f"}',
    ]
    raw: list[Any] = [{"from": "function_call", "value": text} for text in texts]
    messages = parse_messages(raw, {}, role="from")
    assert [[c["function"]["name"] for c in m.get("tool_calls", ())] for m in messages] == [["f"], ["f", "g"], [], []]
    assert messages[1]["tool_calls"][1]["function"]["arguments"] == {"b": 2}
    assert [message["content"] for message in messages] == ["", "", *texts[2:]]
    assert {message["role"] for message in messages} == {"assistant"}
