"""ASGI over a Serve handle: the engine's side runs its own app and yields messages, the gateway's side sends them on.

A request is one small dict with the whole body, an answer a stream of lists of ASGI messages. What has come together
while the last list was under way goes into one; the first is never held back. Other message types than http.* pass
untouched.
"""

import asyncio
from collections.abc import AsyncIterator, MutableMapping
from contextlib import aclosing
from typing import Any

from raylm.config.serving import ServeArgs
from raylm.serving.asgi import App, Message, Send
from raylm.serving.replica import Replica
from raylm.serving.usage import USAGE

_GRACE_S = 1.0
_PASSED_ON = (
    "type",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "headers",
    "client",
    "server",
)


def request_of(scope: Message, body: bytes) -> dict[str, Any]:
    """What travels: plain values, without the state and extensions of the server that took the request."""
    request = {key: scope[key] for key in _PASSED_ON if key in scope}
    request["headers"] = [(bytes(name), bytes(value)) for name, value in scope["headers"]]
    return {"scope": request, "body": body}


async def messages_of(app: App, request: dict[str, Any]) -> AsyncIterator[list[Message]]:
    """Runs the request through the app and yields what it sends, as it comes.

    Closing the iterator tells the app that the client has left, and then cancels it: vLLM's routes that do not stream
    watch for the first and survive the second. Raises what the app raises.
    """
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    left = asyncio.Event()
    bodies = [{"type": "http.request", "body": request["body"], "more_body": False}]

    async def receive() -> Message:
        if bodies:
            return bodies.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.put_nowait(message)

    scope = {"asgi": {"version": "3.0", "spec_version": "2.3"}, "root_path": "", "extensions": {}, **request["scope"]}
    task: asyncio.Task[None] = asyncio.ensure_future(app(scope, receive, send))
    task.add_done_callback(lambda _: sent.put_nowait(None))
    try:
        ended = False
        while not ended:
            batch = [await sent.get()]
            while not sent.empty():
                batch.append(sent.get_nowait())
            ended = batch[-1] is None
            if messages := _joined([message for message in batch if message is not None]):
                yield messages
        await task
    finally:
        left.set()
        try:
            await asyncio.wait((task,), timeout=_GRACE_S)
        finally:
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _joined(messages: list[Message]) -> list[Message]:
    """Bodies that follow each other as one, as every message costs the gateway a write; what they cost as one too."""
    joined: list[Message] = []
    body: Message | None = None
    usage: Message | None = None
    for message in messages:
        kind = message["type"]
        if kind == "http.response.body" and body is not None:
            body["body"] = body.get("body", b"") + message.get("body", b"")
            body["more_body"] = message.get("more_body", False)
            continue
        if kind == USAGE and usage is not None:
            for key in ("prompt_tokens", "completion_tokens"):
                usage[key] += message[key]
            continue
        joined.append(dict(message))
        if kind == USAGE:
            usage = joined[-1]
        else:
            body = joined[-1] if kind == "http.response.body" else None
    return joined


class EngineReplica(Replica):
    """A replica behind a gateway: reached by handle only, so that keys and limits are the gateway's."""

    async def __init__(self, args: ServeArgs) -> None:  # type: ignore[misc]  # Serve awaits it
        """Starts the engine and the app. Raises ServingError with vLLM's reason when the engine does not start."""
        from uvicorn import Config
        from uvicorn.lifespan.on import LifespanOn

        await super().__init__(args, None)
        self._app = await self.__serve_build_asgi_app__()
        self._lifespan = LifespanOn(Config(self._app, lifespan="on", log_config=None))
        await self._lifespan.startup()

    async def handle(self, request: dict[str, Any]) -> AsyncIterator[list[Message]]:
        """What the app answers to `request_of(…)`. A cancelled call cancels the request in the engine."""
        async with aclosing(messages_of(self._app, request)) as messages:  # type: ignore[type-var]
            async for batch in messages:
                yield batch

    async def answer(self, request: dict[str, Any]) -> tuple[int, bytes]:
        """Status and body of a short answer, for requests that go to every replica."""
        status, body = 500, b""
        async for batch in messages_of(self._app, request):
            for message in batch:
                status = message.get("status", status)
                body += message.get("body", b"")
        return status, body

    async def __del__(self) -> None:
        """Serve's destructor: ends the engine."""
        if hasattr(self, "_lifespan"):
            await self._lifespan.shutdown()


async def relay(handle: Any, request: dict[str, Any], send: Send) -> None:
    """Sends on what the engine behind the handle answers; when the caller is cancelled, so is the engine's request.

    handle: of `EngineReplica`, with `stream=True`. Raises what Ray raises when the engine is lost.
    """
    answers = handle.handle.remote(request)
    ended = False
    try:
        async for messages in answers:
            for message in messages:
                await send(message)
        ended = True
    finally:
        if not ended:
            answers.cancel()


def copied(scope: MutableMapping[str, Any], **changes: Any) -> dict[str, Any]:
    """A scope for a request of the gateway's own."""
    return {**scope, **changes}
