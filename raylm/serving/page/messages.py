"""Messages as Gradio's Chatbot holds them, and as the API takes them.

A message of the chatbot comes from the browser, so nothing of it is trusted: only roles and texts are read, never the
files and components that a Chatbot can hold as well.
"""

from collections.abc import Mapping, Sequence
from typing import Any

ROLES = ("user", "assistant")
REASONING = "Reasoning"

ChatMessage = dict[str, Any]


def message(role: str, text: str, *, title: str | None = None, pending: bool = False) -> ChatMessage:
    """A message for the Chatbot. title: shown folded under this heading, and not sent to the model."""
    metadata = {"title": title, "status": "pending" if pending else "done"} if title else None
    return {"role": role, "content": [{"type": "text", "text": text}], "metadata": metadata, "options": None}


def read_messages(value: Any) -> list[ChatMessage]:
    """The texts of a Chatbot's value as the browser sent it, in its order; what is not a text is dropped."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return []
    found = []
    for item in value:
        if isinstance(item, Mapping) and item.get("role") in ROLES:
            metadata = item.get("metadata")
            title = metadata.get("title") if isinstance(metadata, Mapping) else None
            found.append(message(item["role"], text_of(item), title=str(title) if title else None))
    return found


def text_of(item: Mapping[str, Any]) -> str:
    """The text of one message, whose content is a string or a list of parts."""
    content = item.get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = [part if isinstance(part, str) else part.get("text") for part in parts if isinstance(part, str | Mapping)]
    return "".join(text for text in texts if isinstance(text, str))


def as_request(messages: Sequence[ChatMessage], system: str) -> list[dict[str, str]]:
    """The `messages` of a request: the system prompt, if any, then the turns without reasoning."""
    turns = [{"role": m["role"], "content": text_of(m)} for m in messages if not (m["metadata"] or {}).get("title")]
    return [*([{"role": "system", "content": system}] if system.strip() else []), *turns]


def last_user_turn(messages: Sequence[ChatMessage], index: int | None = None) -> int | None:
    """Where the last message of the user at or before `index` stands; None where there is none."""
    last = len(messages) - 1 if index is None else min(index, len(messages) - 1)
    return next((i for i in range(last, -1, -1) if messages[i]["role"] == "user"), None)


def plain(text: str) -> str:
    """Text that a Markdown component shows as it is, whatever stands in it."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{char}" if char in "\\`*_{}[]()#+-.!|~$:" else char for char in " ".join(escaped.split()))
