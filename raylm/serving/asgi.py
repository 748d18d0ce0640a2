"""ASGI in plain types, and OpenAI's error objects as ASGI messages."""

import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]

DISCONNECT: Message = {"type": "http.disconnect"}


def error_body(message: str, kind: str, code: str | int) -> bytes:
    """OpenAI's error object. kind: what clients read as `error.type`."""
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()


async def send_json(send: Send, status: int, body: bytes, headers: Headers = ()) -> None:
    """One whole response."""
    length = (b"content-length", str(len(body)).encode())
    all_headers = [(b"content-type", b"application/json"), length, *headers]
    await send({"type": "http.response.start", "status": status, "headers": all_headers})
    await send({"type": "http.response.body", "body": body})


def is_preflight(scope: Message) -> bool:
    """Whether a browser asks if a page of another origin may ask. Such a request carries no key; a CORS middleware
    answers it before any route."""
    if scope["method"] != "OPTIONS":
        return False
    names = {name for name, _ in scope["headers"]}
    return b"origin" in names and b"access-control-request-method" in names


def route_of(scope: Message) -> str:
    """The path below the prefix that the application is mounted at."""
    return scope["path"].removeprefix(scope.get("root_path", ""))
