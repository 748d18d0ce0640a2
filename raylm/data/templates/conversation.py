"""Conversation templates as plain declarations: what stands around each turn, and nothing to execute.

One declaration is read in three ways: rendered here in Python (microseconds a turn), written out as the Jinja chat
template of an exported model (to_jinja.py), and listed in the table of presets. A test holds the first two equal.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal

from raylm.data.schema import RowProblem
from raylm.data.templates.segments import Segment

PLACEHOLDERS = ("bos", "eos", "content", "tool", "name", "arguments")
_PLACEHOLDER = re.compile("{(" + "|".join(PLACEHOLDERS) + ")}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolListing:
    """How the tools of a conversation are appended to its system text; each: with `{tool}`, a tool as JSON."""

    each: str
    before: str = ""
    between: str = ""
    after: str = ""
    after_system: str = ""
    """Between the system text and the listing, where there is a system text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequel:
    """Several items in a row: tool calls in an answer (`{name}`, `{arguments}`), or tool results (`{content}`)."""

    each: str
    before: str = ""
    between: str = ""
    after: str = ""
    after_content: str = ""
    """Between the text of an answer and its calls, where there is text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationTemplate:
    """What stands around the turns of a conversation. `{content}` is the text of a turn; `{bos}` and `{eos}` are the
    tokenizer's own tokens."""

    name: str
    user: str
    header: str
    """Before an answer. A prompt that asks for one ends with it, less the spaces at its end: a tokenizer joins those
    to the first word of the answer."""
    end: str = ""
    """Ends an answer, and carries loss: what the model must write to stop."""
    after: str = ""
    last_end: str | None = None
    """`end` of the last answer, where it differs; the same for `last_after`."""
    last_after: str | None = None
    header_after_result: str | None = None
    """`header` of an answer that follows a tool result, where it differs."""
    system: str | None = None
    """None refuses conversations with a system text."""
    system_in_user: bool = False
    """The system text stands within the first user turn."""
    default_system: str = ""
    always_system: bool = False
    start: str = ""
    between: str = ""
    tools: ToolListing | None = None
    calls: Sequel | None = None
    results: Sequel | None = None
    strip: bool = False
    """Removes white space around the text of turns."""
    alternate: bool = False
    """Refuses turns that do not alternate between user and assistant."""
    reasoning: Literal["none", "dropped", "last_turn"] = "none"
    """Thinking (`reasoning`, or text up to </think>): none: has no place of its own; dropped: cut from every answer;
    last_turn: shown in answers after the last user turn, in <think> tags, and cut from the others."""
    source: str = ""

    def __post_init__(self) -> None:
        for field in ("user", "system"):
            text = getattr(self, field)
            if text is not None and text.count("{content}") != 1:
                raise ValueError(f"template {self.name}: {field} must hold {{content}} once, it is {text!r}")
        if self.system_in_user and self.system is None:
            raise ValueError(f"template {self.name}: system_in_user needs system")

    @property
    def generation_prompt(self) -> str:
        """`header` as it stands at the end of a prompt."""
        return self.header.rstrip(" ")


def render(
    template: ConversationTemplate,
    conversation: Mapping[str, Any],
    *,
    bos_token: str | None,
    eos_token: str | None,
    add_generation_prompt: bool = False,
) -> list[Segment]:
    """A conversation as segments of text; joined, they are the whole rendering.

    conversation: `{"system"?, "tools"?, "messages": [{"role", "content", "tool_calls"?, "reasoning"?}, …]}`; a first
    message of role system is the same as `system`. Raises RowProblem where the template has no place for something.
    """
    form = _resolved(template, bos_token or "", eos_token or "")
    system, messages = _system_and_turns(conversation)
    system = system if system.strip() else form.default_system
    if conversation.get("tools"):
        system = _with_tools(form, system, conversation["tools"])
    _check_turns(form, system, messages)
    out = _Segments()
    out.add(form.start)
    place_system = bool(system) or form.always_system
    system_text = _fill(form.system or "", content=system) if place_system else ""
    if place_system and not form.system_in_user:
        out.add(system_text)
    last_query = _last_query(messages) if form.reasoning == "last_turn" else -1
    for position, message in enumerate(messages):
        role = message["role"]
        if position or (place_system and not form.system_in_user):
            out.add(form.between)
        if role == "user":
            content = _text(form, message)
            if position == 0 and form.system_in_user:
                content = system_text + content
            out.add(_fill(form.user, content=content))
        elif role == "tool":
            _add_result(form, out, messages, position)
        else:
            after_result = position > 0 and messages[position - 1]["role"] == "tool"
            header = form.header_after_result if after_result else None
            header = form.header if header is None else header
            last = position == len(messages) - 1
            end = form.last_end if last and form.last_end is not None else form.end
            after = form.last_after if last and form.last_after is not None else form.after
            out.add(header.rstrip(" "))
            out.add(header[len(header.rstrip(" ")) :], generated=True)
            out.add(_answer(form, message, shows_reasoning=position > last_query, last=last) + end, turn=position)
            out.add(after)
    if add_generation_prompt:
        if messages or place_system:
            out.add(form.between)
        follows_result = bool(messages) and messages[-1]["role"] == "tool"
        prompt = form.header_after_result if follows_result else None
        out.add((form.header if prompt is None else prompt).rstrip(" "))
    return out.segments


class _Segments:
    """Collects pieces, joining neighbours of the same kind."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []

    def add(self, text: str, *, generated: bool = False, turn: int = -1) -> None:
        """turn: of an answer, which carries loss."""
        if not text:
            return
        last = self.segments[-1] if self.segments else None
        if last is not None and turn < 0 and last.turn < 0 and last.generated == generated:
            self.segments[-1] = Segment(last.text + text, False, generated)
        else:
            self.segments.append(Segment(text, turn >= 0, generated, turn=turn))


@lru_cache(maxsize=64)
def _resolved(template: ConversationTemplate, bos: str, eos: str) -> ConversationTemplate:
    """The template with the tokenizer's own tokens in place."""

    def resolve(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace("{bos}", bos).replace("{eos}", eos)
        if isinstance(value, ToolListing | Sequel):
            return replace(value, **{field.name: resolve(getattr(value, field.name)) for field in fields(value)})
        return value

    kept = ("name", "source", "default_system", "reasoning")
    names = [field.name for field in fields(template) if field.name not in kept]
    return replace(template, **{name: resolve(getattr(template, name)) for name in names})


def _fill(form: str, **values: str) -> str:
    """Puts values in place of `{name}`; text within the values is left alone."""
    if "{" not in form:
        return form
    if len(values) == 1:  # the usual case, without a regular expression
        (name, value), *_ = values.items()
        before, found, after = form.partition("{" + name + "}")
        return before + value + after if found else form
    return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), form)


def _system_and_turns(conversation: Mapping[str, Any]) -> tuple[str, Sequence[Mapping[str, Any]]]:
    messages = conversation["messages"]
    system = conversation.get("system") or ""
    if messages and messages[0]["role"] == "system":
        if system:
            raise RowProblem("has a system text and a system message.", "Keep one of them.")
        return messages[0]["content"], messages[1:]
    return system, messages


def _check_turns(form: ConversationTemplate, system: str, messages: Sequence[Mapping[str, Any]]) -> None:
    if system and form.system is None:
        raise RowProblem(f"has a system text, for which the template {form.name} has no place.")
    if form.system_in_user and system and (not messages or messages[0]["role"] != "user"):
        raise RowProblem(f"begins without a user turn, where the template {form.name} puts the system text.")
    for position, message in enumerate(messages):
        role = message["role"]
        if role not in ("user", "assistant", "tool"):
            raise RowProblem(f"message {position} has role {role!r}, for which the template {form.name} has no place.")
        if role == "tool" and form.results is None:
            raise RowProblem(f"message {position} is a tool's, for which the template {form.name} has no place.")
        if message.get("tool_calls") and form.calls is None:
            raise RowProblem(f"message {position} calls tools, for which the template {form.name} has no place.")
        if message.get("reasoning") and form.reasoning == "none":
            raise RowProblem(f"message {position} has reasoning, for which the template {form.name} has no place.")
        if form.alternate and role != ("user", "assistant")[position % 2]:
            raise RowProblem(
                f"message {position} is a second {role} turn; the template {form.name} wants them in turn."
            )


def _with_tools(form: ConversationTemplate, system: str, tools: Sequence[Any]) -> str:
    listing = form.tools
    if listing is None:
        raise RowProblem(f"has tools, for which the template {form.name} has no place.")
    shown = listing.between.join(_fill(listing.each, tool=as_json(tool)) for tool in tools)
    return system + (listing.after_system if system else "") + listing.before + shown + listing.after


def as_json(value: Any) -> str:
    """As Hugging Face's `tojson` prints it; text is taken for JSON already."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _text(form: ConversationTemplate, message: Mapping[str, Any]) -> str:
    content: str = message["content"]
    return content.strip() if form.strip else content


def _add_result(
    form: ConversationTemplate, out: _Segments, messages: Sequence[Mapping[str, Any]], position: int
) -> None:
    results = form.results
    assert results is not None
    follows = position > 0 and messages[position - 1]["role"] == "tool"
    goes_on = position + 1 < len(messages) and messages[position + 1]["role"] == "tool"
    out.add(results.between if follows else results.before)
    out.add(_fill(results.each, content=_text(form, messages[position])))
    out.add("" if goes_on else results.after)


def _answer(form: ConversationTemplate, message: Mapping[str, Any], *, shows_reasoning: bool, last: bool) -> str:
    thinking, content = _thinking_and_content(form, message, shows=shows_reasoning, last=last)
    if not message.get("tool_calls"):
        return thinking + content
    calls = form.calls
    assert calls is not None
    written = [
        _fill(calls.each, name=call["function"]["name"], arguments=as_json(call["function"]["arguments"]))
        for call in message["tool_calls"]
    ]
    joint = calls.after_content if content else ""
    return thinking + content + joint + calls.before + calls.between.join(written) + calls.after


def _thinking_and_content(
    form: ConversationTemplate, message: Mapping[str, Any], *, shows: bool, last: bool
) -> tuple[str, str]:
    content = _text(form, message)
    if form.reasoning == "none":
        return "", content
    if form.reasoning == "dropped":
        return "", content.split("</think>")[-1]
    reasoning = message.get("reasoning") or ""
    if not reasoning and "</think>" in content:
        reasoning = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
        content = content.split("</think>")[-1].lstrip("\n")
    if shows and (last or reasoning):
        return "<think>\n" + reasoning.strip("\n") + "\n</think>\n\n", content.lstrip("\n")
    return "", content


def _last_query(messages: Sequence[Mapping[str, Any]]) -> int:
    """The last user turn that is not a tool's answer written as one."""
    queries = [
        position
        for position, message in enumerate(messages)
        if message["role"] == "user"
        and not (message["content"].startswith("<tool_response>") and message["content"].endswith("</tool_response>"))
    ]
    return queries[-1] if queries else len(messages) - 1
