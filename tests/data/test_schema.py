from typing import Any

import pytest

from raylm.data.schema import RowProblem, conversation_from_json, conversation_to_json, parse_conversation

USER = {"role": "user", "content": "hi"}
BOT = {"role": "assistant", "content": "hello"}


def test_a_conversation_round_trips_as_json() -> None:
    instance = {"conversation_id": 7, "system": "Be brief.", "messages": [{"role": "user", "content": "ä\u2028ü"}, BOT]}
    conversation = parse_conversation(instance, {})
    assert [m["role"] for m in conversation["messages"]] == ["system", "user", "assistant"]
    assert conversation_from_json(conversation_to_json(conversation)) == conversation


def test_roles_are_mapped() -> None:
    row = {"messages": [{"role": "human", "content": "hi"}, {"role": "bot", "content": "x"}]}
    conversation = parse_conversation(row, {"human": "user", "bot": "assistant"})
    assert [m["role"] for m in conversation["messages"]] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("instance", "problem"),
    [
        (7, "is a number, not an object with messages."),
        ({}, "has no messages."),
        ({"messages": []}, "has no messages."),
        ({"messages": "hi"}, "messages is text, not a list."),
        ({"messages": ["hi"]}, "message 0 is text, not an object with role and content."),
        ({"messages": [{"content": "x"}]}, "message 0 has no role."),
        ({"messages": [{"role": "bot", "content": "x"}]}, "role 'bot' is not one of system, user, assistant, tool."),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "message 1 (assistant) has no content."),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, "message 1 (assistant) has a number as content."),
        ({"messages": [USER]}, "has no assistant message, so nothing to train on."),
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
            "message 1 holds half of a surrogate pair, which is not text.",
        ),
        ({"tools": [{"name": "f"}], "messages": [USER, BOT]}, "has tools, which are not supported yet."),
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
