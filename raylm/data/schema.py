"""The row types of a dataset and their validation.

A row is checked once, right where it is read, and carried on as JSON text: columnar storage would unify the keys of
nested values over rows (tool schemas, content parts) and change what a template prints.
"""

import json
from collections.abc import Mapping
from typing import Any, TypedDict

ROLES = ("system", "user", "assistant", "tool")


class Message(TypedDict, total=False):
    """One turn: `role` is one of ROLES, `content` its text."""

    role: str
    content: str


class Conversation(TypedDict, total=False):
    """A validated conversation; the system text, when there is one, is its first message."""

    messages: list[Message]


class RowProblem(Exception):
    """Why a row cannot be used. Never leaves the data room: it becomes a count, or a DataError with file and row."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem, remedy)
        self.problem, self.remedy = problem, remedy


def parse_conversation(instance: object, role_map: Mapping[str, str]) -> Conversation:
    """Checks one instance of an LMFlow conversation dataset and returns it in the one form the rest of raylm knows.

    instance: `{"messages": [{"role", "content"}, …], "system"?: str, "tools"?: [], …}`; other keys are ignored, as
    LMFlow does (`conversation_id` is one). Raises RowProblem.
    """
    if not isinstance(instance, dict):
        raise RowProblem(f"is {_kind(instance)}, not an object with messages.")
    raw = instance.get("messages")
    if not isinstance(raw, list) or not raw:
        raise RowProblem("has no messages." if not raw else f"messages is {_kind(raw)}, not a list.")
    if instance.get("tools"):
        raise RowProblem("has tools, which are not supported yet.", "Remove the row or its tools.")
    messages = [_parse_message(position, message, role_map) for position, message in enumerate(raw)]
    system = instance.get("system")
    if system is not None and not isinstance(system, str):
        raise RowProblem(f"system is {_kind(system)}, not text.")
    if system:
        if messages[0]["role"] == "system":
            raise RowProblem("has a system text and a system message.", "Keep one of them.")
        messages.insert(0, {"role": "system", "content": _checked_text(system, "system")})
    _check_order(messages)
    return {"messages": messages}


def conversation_to_json(conversation: Conversation) -> str:
    """Text that `conversation_from_json` turns into an equal conversation."""
    return json.dumps(conversation, ensure_ascii=False, separators=(",", ":"))


def conversation_from_json(text: str) -> Conversation:
    """The conversation that `conversation_to_json` wrote."""
    conversation: Conversation = json.loads(text)
    return conversation


def _parse_message(position: int, message: Any, role_map: Mapping[str, str]) -> Message:
    where = f"message {position}"
    if not isinstance(message, dict):
        raise RowProblem(f"{where} is {_kind(message)}, not an object with role and content.")
    role = message.get("role")
    if not isinstance(role, str):
        raise RowProblem(f"{where} has no role.")
    role = role_map.get(role, role)
    if role not in ROLES:
        raise RowProblem(
            f"role {role!r} is not one of {', '.join(ROLES)}.",
            f"Rename it, or set data.role_map={{{role}: assistant}}.",
        )
    if message.get("tool_calls"):
        raise RowProblem(f"{where} has tool_calls, which are not supported yet.", "Remove the row.")
    content = message.get("content")
    if not isinstance(content, str):
        raise RowProblem(f"{where} ({role}) has {'no' if content is None else _kind(content) + ' as'} content.")
    return {"role": role, "content": _checked_text(content, where)}


def _checked_text(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RowProblem(f"{where} holds half of a surrogate pair, which is not text.") from None
    return text


def _check_order(messages: list[Message]) -> None:
    if any(message["role"] == "system" for message in messages[1:]):
        raise RowProblem("has a system message after the first message.")
    if not any(message["role"] == "assistant" for message in messages):
        raise RowProblem("has no assistant message, so nothing to train on.")


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
