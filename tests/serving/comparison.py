"""An answer in a form that two servers can be compared in: without ids and times, a stream as what it adds up to."""

import json
import re
from dataclasses import dataclass
from typing import Any

import httpx

_IDS = {"id", "item_id", "request_id", "call_id", "system_fingerprint"}
_TIMES = {"created", "created_at", "completed_at"}
_DECIMALS = 3  # of a log-probability


@dataclass(frozen=True)
class Answer:
    """status; media: content type; body: normalised JSON, or text; events, texts: of a stream, else empty.

    events: the kinds of the events in order, those of each choice for themselves, and equal neighbours once, because a
    busy server sends two tokens in one.
    texts: what the deltas of each choice add up to.
    """

    status: int
    media: str
    body: Any
    events: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()


def answer_of(response: httpx.Response, *, shape_only: bool = False) -> Answer:
    """Normalises an answer. Raises AssertionError for a stream that is not one of JSON events in UTF-8."""
    media = response.headers.get("content-type", "").split(";")[0]
    if media == "text/event-stream":
        return _stream(response, media)
    if media != "application/json":
        return Answer(response.status_code, media, response.text)
    body = normalised(response.json())
    return Answer(response.status_code, media, shape(body) if shape_only else body)


def whole_texts(answer: Answer) -> tuple[str, ...]:
    """The text of each choice of an answer that was not streamed."""
    choices = answer.body["choices"]
    return tuple(_content(choice) for choice in sorted(choices, key=lambda choice: choice["index"]))


def normalised(value: Any, key: str = "") -> Any:
    """Ids and times become their type's name, log-probabilities lose digits."""
    if isinstance(value, dict):
        return {name: normalised(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [normalised(inner, key) for inner in value]
    if (key in _IDS or key in _TIMES) and value is not None and value != "tiny-llama":
        return type(value).__name__
    if isinstance(value, float):
        return round(value, _DECIMALS)
    if isinstance(value, str):
        return re.sub(r"(chatcmpl|cmpl|resp|msg|call|fc|rs|modelperm|chatcmpl-tool)[-_][0-9a-f-]{8,}", r"\1-*", value)
    return value


def shape(value: Any) -> Any:
    """Keys and types; a list is the shapes that occur in it."""
    if isinstance(value, dict):
        return {name: shape(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return sorted({json.dumps(shape(inner), sort_keys=True) for inner in value})
    return type(value).__name__


def _stream(response: httpx.Response, media: str) -> Answer:
    kinds: dict[int, list[str]] = {}
    texts: dict[int, str] = {}
    usage: Any = None
    # Strict decoding: a character cut in two by a chunk would raise here.
    for line in response.content.decode("utf-8").splitlines():
        name, _, data = line.partition(": ")
        if name != "data":
            assert not line or name == "event", line
            continue
        if data == "[DONE]":
            kinds.setdefault(-1, []).append("done")
            continue
        event = json.loads(data)
        usage = event.get("usage") or usage
        for choice in event.get("choices", ()):
            texts[choice["index"]] = texts.get(choice["index"], "") + _content(choice)
        if event.get("type", "").endswith(".delta"):
            texts[0] = texts.get(0, "") + event["delta"]
        kind = _kind(event)
        of_choice = kinds.setdefault(min((choice["index"] for choice in event.get("choices", ())), default=-1), [])
        if not of_choice or of_choice[-1] != kind:
            of_choice.append(kind)
    events = tuple(kind for _, kinds_of_choice in sorted(kinds.items()) for kind in kinds_of_choice)
    joined = tuple(text for _, text in sorted(texts.items()))
    return Answer(response.status_code, media, normalised(usage), events, joined)


def _content(choice: dict[str, Any]) -> str:
    """Text of a choice, whole or delta: its content, else the arguments of its calls."""
    if "text" in choice:
        return choice["text"]
    part = choice.get("message") or choice.get("delta") or {}
    calls = "".join((call.get("function") or {}).get("arguments") or "" for call in part.get("tool_calls") or ())
    return (part.get("content") or "") + calls


def _kind(event: dict[str, Any]) -> str:
    """Keys of an event and its choices, and what is no text: reasons, roles, names of tools, whether there is usage."""
    if "type" in event:
        return f"{event['type']} {sorted(event)}"
    parts = [
        (
            choice["index"] if choice.get("finish_reason") else "",
            sorted(choice.get("delta", {})),
            sorted(key for key in choice if key != "delta"),
            choice.get("finish_reason"),
            choice.get("delta", {}).get("role"),
            [(call.get("function") or {}).get("name") for call in choice.get("delta", {}).get("tool_calls") or ()],
        )
        for choice in event["choices"]
    ]
    return json.dumps([sorted(event), event["object"], bool(event.get("usage")), parts])
