"""The row types of a dataset and the checks of their parts.

A row travels as JSON text until the worker that renders it: columnar storage would unify the keys of nested values
over rows (tool schemas, content parts) and change what a template prints.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Literal, TypedDict

ROLES = ("system", "user", "assistant", "tool")
ROLE_ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "developer": "system",
    "observation": "tool",
    "function_call": "function",
}
"""Other names of roles, as ShareGPT, LMFlow and OpenAI have them; `function` is the turn in which a tool is called."""


_PLAIN_ROLES = {role: role for role in ROLES} | {alias: role for alias, role in ROLE_ALIASES.items() if role in ROLES}


class ToolFunction(TypedDict):
    """A call: the name of a function and its arguments, an object."""

    name: str
    arguments: dict[str, Any]


class ToolCall(TypedDict):
    """A call as OpenAI writes it."""

    type: Literal["function"]
    function: ToolFunction


class Message(TypedDict, total=False):
    """One turn: `role` is one of ROLES, `content` its text; train: False takes its loss away."""

    role: str
    content: str
    tool_calls: list[ToolCall]
    reasoning: str
    name: str
    tool_call_id: str
    train: bool


class Conversation(TypedDict, total=False):
    """A validated conversation; the system text, when there is one, is its first message."""

    messages: list[Message]
    tools: list[Any]


class RowProblem(Exception):
    """Why a row cannot be used. Never leaves the data room: it becomes a count, or a DataError with file and row."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem, remedy)
        self.problem, self.remedy = problem, remedy

    def __str__(self) -> str:
        return " ".join(filter(None, (self.problem, self.remedy)))


def load_json(text: str) -> Any:
    """The value of a JSON text. Raises RowProblem for duplicate keys, NaN and Infinity, and json.JSONDecodeError."""
    value = _PLAIN_DECODER.decode(text)
    # A hook for every object costs more than the parsing. Without one, a key given twice shows as a key missing: each
    # key is followed by a quote and a colon. Where white space or quoted text blurs the count, the hook decides.
    if text.count('":') != _num_keys(value) or _SPACED_COLON.search(text):
        value = json.loads(text, object_pairs_hook=_object_with_unique_keys, parse_constant=_refuse_constant)
    return value


_SPACED_COLON = re.compile(r'"[ \t\r\n]+:')


def _num_keys(value: Any) -> int:
    count = 0
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        if type(inner) is dict:
            count += len(inner)
            inner = inner.values()
        elif type(inner) is not list:
            continue
        waiting += [part for part in inner if type(part) is dict or type(part) is list]
    return count


_PLAIN_DECODER = json.JSONDecoder(parse_constant=lambda name: _refuse_constant(name))
DECODER = json.JSONDecoder(
    object_pairs_hook=lambda pairs: _object_with_unique_keys(pairs),
    parse_constant=lambda name: _refuse_constant(name),
)
"""As `load_json`, for values within a longer text."""


def parse_conversation(instance: Mapping[str, Any], role_map: Mapping[str, str]) -> Conversation:
    """Checks `{"messages": […], "system"?: str, "tools"?: […]}` and returns it in the form the rest of raylm knows.

    Keys that nothing needs are ignored, as LMFlow does (`conversation_id` is one). Raises RowProblem.
    """
    raw = instance.get("messages")
    if not isinstance(raw, list) or not raw:
        raise RowProblem("has no messages." if not raw else f"messages is {kind_of(raw)}, not a list.")
    conversation: Conversation = {"messages": parse_messages(raw, role_map)}
    _add_system(conversation["messages"], instance.get("system"))
    if tools := parse_tools(instance.get("tools")):
        conversation["tools"] = tools
    check_order(conversation["messages"])
    return conversation


def parse_messages(raw: list[Any], role_map: Mapping[str, str], *, role: str = "role") -> list[Message]:
    """Messages in the one form; role: the key that names it. Raises RowProblem."""
    content = {"role": "content", "from": "value"}.get(role, "content")
    messages: list[Message] = []
    for at, message in enumerate(raw):
        # Nearly all messages are a known role and a text, and nothing else.
        if type(message) is dict and len(message) == 2:
            given, text = message.get(role), message.get(content)
            if type(given) is str and type(text) is str and given not in role_map and is_valid(text):
                name = _PLAIN_ROLES.get(given)
                if name is not None:
                    messages.append({"role": name, "content": text})
                    continue
        messages.append(_parse_message(f"message {at}", message, role_map, role, content))
    return messages


def parse_tools(raw: Any) -> list[Any]:
    """Tool descriptions as objects, or as text where a description is no JSON object. Raises RowProblem."""
    if raw is None or raw == "":
        return []
    if isinstance(raw, str):  # ShareGPT keeps the list as JSON text
        try:
            raw = load_json(raw)
        except ValueError:
            raise RowProblem("tools is text, but no JSON.") from None
    if not isinstance(raw, list):
        raise RowProblem(f"tools is {kind_of(raw)}, not a list.")
    tools = []
    for position, tool in enumerate(raw):
        if not isinstance(tool, dict | str):
            raise RowProblem(f"tool {position} is {kind_of(tool)}, not an object.")
        tools.append(tool)
    return tools


def check_order(messages: list[Message]) -> None:
    """Raises RowProblem for a late system message."""
    if any(message["role"] == "system" for message in messages[1:]):
        raise RowProblem("has a system message after the first message.")


def required_text(instance: Mapping[str, Any], key: str) -> str:
    """The text under a key. Raises RowProblem."""
    if key not in instance:
        raise RowProblem(f"has no {key}.")
    return checked_text(instance[key], key)


def optional_text(instance: Mapping[str, Any], key: str) -> str:
    """The text under a key, empty when it is missing or null. Raises RowProblem."""
    value = instance.get(key)
    return "" if value is None else checked_text(value, key)


def checked_text(value: Any, where: str) -> str:
    """The value as valid text. Raises RowProblem."""
    if not isinstance(value, str):
        raise RowProblem(f"{where} is {kind_of(value)}, not text.")
    if not is_valid(value):
        raise RowProblem(f"{where} holds half of a surrogate pair, which is not text.")
    return value


def is_valid(text: str) -> bool:
    """False for half of a surrogate pair, which JSON can write and UTF-8 cannot."""
    if text.isascii():  # known without looking at the characters
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def kind_of(value: object) -> str:
    """What messages call a JSON value."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _object_with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        keys = [key for key, _ in pairs]
        doubled = next(key for key in keys if keys.count(key) > 1)
        raise RowProblem(f"key {doubled!r} is given twice in one object.", "Keep one.")
    return mapping


def _refuse_constant(name: str) -> Any:
    raise RowProblem(f"{name} is not JSON.", "Replace it by a number or null.")


def _parse_message(where: str, message: Any, role_map: Mapping[str, str], role_key: str, content_key: str) -> Message:
    if not isinstance(message, dict):
        raise RowProblem(f"{where} is {kind_of(message)}, not an object with {role_key} and {content_key}.")
    given = message.get(role_key)
    if not isinstance(given, str):
        raise RowProblem(f"{where} has no {role_key}.")
    role = role_map.get(given) or ROLE_ALIASES.get(given, given)
    if role == "function":  # OpenAI's old name of a result, which names its function; else the turn that calls
        role = "tool" if "name" in message and role_key == "role" else "assistant"
        if role == "assistant" and (calls := _calls_in_text(message.get(content_key))):
            message = {**message, content_key: "", "tool_calls": calls}
    if role not in ROLES:
        raise RowProblem(
            f"role {given!r} is not one of {', '.join(ROLES)}.",
            f"Rename it, or set data.role_map={{{given}: assistant}}.",
        )
    result: Message = {"role": role, "content": _content(message.get(content_key), f"{where} ({role})", message)}
    if message.get("tool_calls"):
        if role != "assistant":
            raise RowProblem(f"{where} has tool_calls, but its role is {role}.")
        result["tool_calls"] = _tool_calls(message["tool_calls"], where)
    reasoning = message.get("reasoning") or message.get("reasoning_content") or message.get("thinking")
    if reasoning:
        result["reasoning"] = checked_text(reasoning, f"{where}: reasoning")
    for key in ("name", "tool_call_id"):
        if isinstance(message.get(key), str):
            result[key] = message[key]
    if not _trains(message, where):
        result["train"] = False
    return result


def _calls_in_text(text: Any) -> list[Any] | None:
    """The calls that a turn of role function holds as JSON, one or a list; None for other text, which is kept."""
    try:
        value = load_json(text) if isinstance(text, str) else None
    except (ValueError, RowProblem, RecursionError):
        return None
    calls = value if isinstance(value, list) else [value]
    are_calls = all(isinstance(call, dict) and set(call) == {"name", "arguments"} for call in calls)
    return calls if calls and are_calls else None


def _trains(message: Mapping[str, Any], where: str) -> bool:
    train, weight = message.get("train"), message.get("weight")
    if train is not None and not isinstance(train, bool):
        raise RowProblem(f"{where}: train is {kind_of(train)}, not true or false.")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise RowProblem(f"{where}: weight is {weight!r}, not 0 or 1.")
    return train is not False and weight != 0


def _content(value: Any, where: str, message: Mapping[str, Any]) -> str:
    if isinstance(value, str):
        return checked_text(value, where)
    if value is None:
        if message.get("tool_calls"):
            return ""
        raise RowProblem(f"{where} has no content.")
    if not isinstance(value, list):
        raise RowProblem(f"{where} has {kind_of(value)} as content.")
    texts = []
    for part in value:
        if isinstance(part, dict) and part.get("type") == "text":
            texts.append(checked_text(part.get("text"), f"{where}: a part's text"))
        else:
            found = part.get("type") if isinstance(part, dict) else kind_of(part)
            raise RowProblem(f"{where} has a content part of type {found!r}; only text can be trained on here.")
    return "".join(texts)


def _tool_calls(raw: Any, where: str) -> list[ToolCall]:
    if not isinstance(raw, list):
        raise RowProblem(f"{where}: tool_calls is {kind_of(raw)}, not a list.")
    calls: list[ToolCall] = []
    for call in raw:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowProblem(f"{where}: a tool call has no function name.")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = load_json(arguments)
            except ValueError:
                raise RowProblem(
                    f"{where}: the arguments of {function['name']} are text, but no JSON: {arguments[:40]!r}."
                ) from None
        if not isinstance(arguments, dict):
            raise RowProblem(f"{where}: the arguments of {function['name']} are {kind_of(arguments)}, not an object.")
        calls.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls


def _add_system(messages: list[Message], system: Any) -> None:
    if system is None or system == "":
        return
    text = checked_text(system, "system")
    if messages[0]["role"] == "system":
        raise RowProblem("has a system text and a system message.", "Keep one of them.")
    messages.insert(0, {"role": "system", "content": text})
