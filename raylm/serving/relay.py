"""ASGI over a Serve handle: the engine's side runs its own app and yields messages, the gateway's side sends them on.

A request is one small dict with the whole body, an answer a stream of lists of ASGI messages. What has come together
while the last list was under way goes into one; the first is never held back. Other message types than http.* pass
untouched.

A cancelled call loses what it still sends, and with it what an answer that nobody waits for has cost: the caller asks
for that in a call of its own (`Visits.leave`).
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, MutableMapping
from contextlib import aclosing
from contextvars import Context
from typing import Any
from uuid import uuid4

from raylm.config.serving import ServeArgs
from raylm.serving.asgi import App, Message, Send
from raylm.serving.replica import Replica
from raylm.serving.usage import TOKENS, USAGE

_GRACE_S = 1.0
_FAREWELL_S = 1.5
_REMEMBERED = 1000
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
    return {"id": uuid4().hex, "scope": request, "body": body}


class Visit:
    """One request in the engine's process. left: its client is known to have gone; over: the app is done with it."""

    __slots__ = ("left", "over", "spent")

    def __init__(self) -> None:
        self.left, self.over = asyncio.Event(), asyncio.Event()
        self.spent = dict.fromkeys(TOKENS, 0)


class Visits:
    """The requests of an engine by id: those at work, and the latest that are over."""

    def __init__(self) -> None:
        self._known: dict[str, Visit] = {}
        self._over: deque[str] = deque()

    async def messages(self, app: App, request: dict[str, Any]) -> AsyncIterator[list[Message]]:
        """As `messages_of`."""
        visit = self._known[request["id"]] = Visit()
        try:
            async with aclosing(messages_of(app, request, visit)) as messages:  # type: ignore[type-var]
                async for batch in messages:
                    yield batch
        finally:
            self._over.append(request["id"])
            if len(self._over) > _REMEMBERED:
                del self._known[self._over.popleft()]

    async def leave(self, request_id: str) -> dict[str, int] | None:
        """Ends a request and returns the tokens it has cost by then; None for one that is not here."""
        visit = self._known.get(request_id)
        if visit is None:
            return None
        visit.left.set()
        await visit.over.wait()
        return visit.spent


async def messages_of(app: App, request: dict[str, Any], visit: Visit | None = None) -> AsyncIterator[list[Message]]:
    """Runs the request through the app and yields what it sends, as it comes.

    Closing the iterator tells the app that the client has left, and then cancels it: vLLM's routes that do not stream
    watch for the first and survive the second. Raises what the app raises. visit: to hear that the client has left by
    another way, and to count what the app says to have spent, whether anybody still hears it or not.
    """
    visit = visit or Visit()
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    left = visit.left
    bodies = [{"type": "http.request", "body": request["body"], "more_body": False}]

    async def receive() -> Message:
        if bodies:
            return bodies.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == USAGE:
            for key in TOKENS:
                visit.spent[key] += message[key]
        sent.put_nowait(message)

    scope = {"asgi": {"version": "3.0", "spec_version": "2.3"}, "root_path": "", "extensions": {}, **request["scope"]}
    task: asyncio.Task[None] = asyncio.ensure_future(app(scope, receive, send))

    def end(_: Any) -> None:
        sent.put_nowait(None)
        visit.over.set()

    task.add_done_callback(end)
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
            for key in TOKENS:
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
        self._start(await self.__serve_build_asgi_app__())
        self._lifespan = LifespanOn(Config(self._app, lifespan="on", log_config=None))
        await self._lifespan.startup()

    def _start(self, app: App) -> None:
        self._app, self._visits = app, Visits()

    async def handle(self, request: dict[str, Any]) -> AsyncIterator[list[Message]]:
        """What the app answers to `request_of(…)`. A cancelled call cancels the request in the engine."""
        async with aclosing(self._visits.messages(self._app, request)) as messages:  # type: ignore[type-var]
            async for batch in messages:
                yield batch

    async def leave(self, request_id: str) -> dict[str, int] | None:
        """See `Visits.leave`. For all replicas: the caller does not know which has the request."""
        return await self._visits.leave(request_id)

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

    handle: of `EngineReplica`, with `stream=True`. Of a request that ends early the last to be sent is what it has
    cost. Raises what Ray raises when the engine is lost.
    """
    answers = handle.handle.remote(request)
    heard = dict.fromkeys(TOKENS, 0)
    try:
        async for messages in answers:
            for message in messages:
                if message["type"] == USAGE:
                    for key in TOKENS:
                        heard[key] += message[key]
                await send(message)
    except asyncio.CancelledError:
        answers.cancel()
        spent = await _spent(handle, request["id"])
        if spent and spent != heard:
            await send({"type": USAGE, **{key: spent[key] - heard[key] for key in TOKENS}})
        raise
    except BaseException:
        answers.cancel()
        raise


async def _spent(handle: Any, request_id: str) -> dict[str, int] | None:
    """What a request that was cancelled has cost; None where no engine says so in time.

    In a context of its own: Serve and Ray cancel what they know to belong to a request that is cancelled.
    """
    task = asyncio.create_task(_leave(handle, request_id), context=Context())
    try:
        await asyncio.wait((task,), timeout=_FAREWELL_S)
        return task.result() if task.done() else None
    finally:
        task.cancel()


async def _leave(handle: Any, request_id: str) -> dict[str, int] | None:
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        found = await handle.broadcast("leave", request_id).results_async(return_exceptions=True)
    except (RayError, RayServeException):
        return None
    return next((spent for spent in found if isinstance(spent, dict)), None)


def copied(scope: MutableMapping[str, Any], **changes: Any) -> dict[str, Any]:
    """A scope for a request of the gateway's own."""
    return {**scope, **changes}
