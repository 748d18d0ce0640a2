"""Requests without a server, apps to stand behind the guard, and a clock that is set."""

import asyncio
import json
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from raylm.config.limits import LimitsSection
from raylm.serving.api_key import ApiKey, digest
from raylm.serving.guard import GuardSettings, guarded

KEYS = (ApiKey("alice", digest("al1ce")), ApiKey("bob", digest("b0b"), requests_per_minute=2, tokens_per_minute=100))


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Answer:
    """What a request got."""

    messages: list[Any] = field(default_factory=list)

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages[1:])

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.body)["error"]


async def ask(
    app: Any,
    path: str = "/v1/completions",
    *,
    method: str = "POST",
    key: str | None = None,
    body: list[bytes] | None = None,
    length: int | None = None,
    gone: asyncio.Event | None = None,
    root_path: str = "",
    **headers: str,
) -> Answer:
    """One request as a server hands it to an app. body: its chunks; length: what `content-length` says, if anything."""
    answer = Answer()
    chunks = [b"{}"] if body is None else body
    messages = [
        {"type": "http.request", "body": chunk, "more_body": number < len(chunks) - 1}
        for number, chunk in enumerate(chunks)
    ]
    gone = gone or asyncio.Event()

    async def receive() -> Any:
        if messages:
            return messages.pop(0)
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        answer.messages.append(message)

    all_headers = {"content-length": str(length)} if length is not None else {}
    if key:
        all_headers["authorization"] = f"Bearer {key}"
    all_headers |= {name.replace("_", "-"): value for name, value in headers.items()}
    scope = {
        "type": "http",
        "path": path,
        "root_path": root_path,
        "method": method,
        "headers": [(name.encode(), value.encode()) for name, value in all_headers.items()],
    }
    await app(scope, receive, send)
    return answer


async def read_body(receive: Any) -> bytes:
    """As Starlette reads it."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError("the client has gone")
        body += message["body"]
        if not message["more_body"]:
            return body


async def respond(send: Any, *chunks: bytes, status: int = 200, kind: bytes = b"text/plain") -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
    for number, chunk in enumerate(chunks):
        await send({"type": "http.response.body", "body": chunk, "more_body": number < len(chunks) - 1})


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the request's body, and with the path it saw in a header."""
    body = await read_body(receive) if scope["method"] == "POST" else b""
    start = {"type": "http.response.start", "status": 200, "headers": [(b"x-path", scope["path"].encode())]}
    await send(start)
    await send({"type": "http.response.body", "body": body})


def costing(prompt_tokens: int, completion_tokens: int) -> Any:
    """An app whose requests cost so many tokens."""

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await respond(send, b"ok")
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
        await send({"type": "raylm.usage", **usage})

    return app


def behind(
    app: Any, *, clock: Any = None, keys: Any = (), log: bool = False, prompts: bool = False, **limits: Any
) -> Any:
    settings = GuardSettings(keys, LimitsSection(**limits), log, prompts)
    return guarded(app, settings, **({"clock": clock} if clock else {}))


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What the coroutine returns, within 20 seconds."""
    return asyncio.run(asyncio.wait_for(coroutine, 20))


class Slow:
    """An app whose requests end when they are told to."""

    def __init__(self) -> None:
        self.running = self.most = 0
        self.order: list[str] = []
        self.go_on = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        self.order.append(dict(scope["headers"])[b"x-request-id"].decode())
        try:
            body = await read_body(receive)
            await self.go_on.wait()
            await respond(send, body)
        finally:
            self.running -= 1


async def settled() -> None:
    """Until every task waits for something that only the test can bring."""
    for _ in range(20):
        await asyncio.sleep(0)
