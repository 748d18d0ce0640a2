"""What stands before the routes: keys, rates, sizes, the queue, the time limit, and the access log.

One pure ASGI middleware, without tasks or copies of its own on the way of a request that need not wait. It knows
neither vLLM nor Ray: replicas wrap vLLM's app in it, and whatever forwards to several replicas wraps itself.
Its limits hold for what passes through this one object.
"""

import asyncio
import math
import re
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from raylm.config.limits import LimitsSection
from raylm.config.serving import ServeArgs
from raylm.serving.access_log import timestamp, write_line
from raylm.serving.api_key import ApiKey, find_key, read_api_keys
from raylm.serving.asgi import DISCONNECT, App, Message, Receive, Send, error_body, is_preflight, route_of, send_json
from raylm.serving.buckets import Allowance
from raylm.serving.gate import Gate
from raylm.serving.usage import USAGE

OPEN_PATHS = frozenset({"/health", "/ready"})
CLIENT_CLOSED_REQUEST = 499  # nginx's code, which Serve uses too; only the log sees it
MAX_LOGGED_BODY_BYTES = 16 * 2**10
_SANE_ID = re.compile(rb"[\w.:-]{1,128}")
_UNAUTHORIZED = error_body("A valid API key is needed as bearer token.", "Unauthorized", 401)


@dataclass(frozen=True, slots=True)
class GuardSettings:
    """What the guard has to know. Picklable; holds digests of keys, no keys."""

    keys: tuple[ApiKey, ...] = ()
    """Without any, every request passes."""
    limits: LimitsSection = field(default_factory=LimitsSection)
    access_log: bool = True
    log_prompts: bool = False

    def or_key(self, key: ApiKey) -> "GuardSettings":
        """With this key, where there is none."""
        return self if self.keys else replace(self, keys=(key,))


def guard_settings(args: ServeArgs) -> GuardSettings:
    """The settings of a server, on the driver: reads the keys. Raises ServingError for a faulty key file."""
    return GuardSettings(read_api_keys(args.api_key_file), args.limits, args.access_log, args.log_prompts)


def guarded(
    app: App, settings: GuardSettings, *, echo_request_id: bool = True, clock: Callable[[], float] = time.monotonic
) -> App:
    """The app behind the guard. `app` may send `raylm.usage` messages (usage.py), which are booked on the key.

    echo_request_id: whether to return `x-request-id`; inside Serve no, its own middleware does. clock: seconds, never
    going back.
    """
    return Guard(app, settings, echo_request_id=echo_request_id, clock=clock)


class Guard:
    """See `guarded`."""

    def __init__(self, app: App, settings: GuardSettings, *, echo_request_id: bool, clock: Callable[[], float]) -> None:
        self._app, self._settings, self._echo, self._clock = app, settings, echo_request_id, clock
        limits = settings.limits
        self._limits = limits
        self._gate = Gate(limits.max_concurrent, limits.queue_places) if limits.max_concurrent else None
        self._keyless = Allowance(limits.requests_per_minute, limits.tokens_per_minute, clock())
        self._allowances = {
            key.name: Allowance(
                key.requests_per_minute or limits.requests_per_minute,
                key.tokens_per_minute or limits.tokens_per_minute,
                clock(),
            )
            for key in settings.keys
        }

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _http(self, scope: Message, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, send, self._clock, echo_request_id=self._echo)
        try:
            await self._answer(exchange, _heard(receive))
        except asyncio.CancelledError:
            exchange.outcome = "disconnect"
            raise
        except BaseException:
            exchange.outcome = "error"
            raise
        finally:
            exchange.book()
            if self._settings.access_log and not (exchange.is_open and exchange.status == 200):
                write_line(exchange.fields())

    async def _answer(self, exchange: "Exchange", receive: Receive) -> None:
        """Refuses, or lets the request in."""
        if exchange.is_open:
            await self._app(exchange.inner_scope(), receive, exchange.send)
            return
        if not self._settings.keys:
            exchange.allowance = self._keyless
        elif not is_preflight(exchange.scope):  # browsers send those without a key, and they reach no route
            key = find_key(self._settings.keys, exchange.authorization)
            if key is None:
                await send_json(exchange.send, 401, _UNAUTHORIZED, [(b"www-authenticate", b"Bearer")])
                return
            exchange.key, exchange.allowance = key.name, self._allowances[key.name]
        if exchange.content_length > self._limits.max_request_bytes:
            await exchange.refuse_size(self._limits.max_request_mib)
            return
        if exchange.length_is_open or self._settings.log_prompts:
            receive = exchange.reading(receive, self._limits, keep=self._settings.log_prompts)
        if exchange.method != "POST" or exchange.allowance is None:
            await self._app(exchange.inner_scope(), receive, exchange.send)
            return
        refusal = exchange.allowance.admit(self._clock())
        if refusal is not None:
            await exchange.refuse_for_now(refusal.reason, "rate_limit_exceeded", refusal.retry_after_s)
            return
        timeout_s = self._limits.request_timeout_s
        if timeout_s is None:
            await self._admit(exchange, receive)
            return
        deadline = asyncio.timeout(timeout_s)
        reader = Reader(receive)
        try:
            async with deadline:
                await self._admit(exchange, reader)
        except TimeoutError:
            if not deadline.expired():
                raise  # one of the app's own
        finally:
            reader.close()
        if deadline.expired():
            await exchange.end_late(timeout_s)

    async def _admit(self, exchange: "Exchange", receive: Receive) -> None:
        """Passes the request on, at once or when a place is free."""
        gate = self._gate
        if gate is None:
            await self._app(exchange.inner_scope(), receive, exchange.send)
            return
        reader = None
        if not gate.enter():
            place = gate.queue()
            if place is None:
                await exchange.refuse_for_now("the queue is full", "queue_full", gate.retry_after_s())
                return
            reader = receive if isinstance(receive, Reader) else Reader(receive)
            if not await self._wait(gate, place, reader):
                return
            exchange.queued_s = self._clock() - exchange.started
        entered = self._clock()
        try:
            await self._app(exchange.inner_scope(), reader or receive, exchange.send)
        finally:
            gate.leave(self._clock() - entered)
            if reader is not None:
                reader.close()

    async def _wait(self, gate: Gate, place: asyncio.Future[None], reader: "Reader") -> bool:
        """Until the place is in: True; False when the client goes before."""
        try:
            await asyncio.wait((place, reader.task), return_when=asyncio.FIRST_COMPLETED)
            if not reader.task.done():
                return True
        except BaseException:
            gate.give_up(place)
            reader.close()
            raise
        gate.give_up(place)
        return False

    async def _websocket(self, scope: Message, receive: Receive, send: Send) -> None:
        """Keys and rates as for other requests; a refusal has no body. Neither queue nor time limit."""
        exchange = Exchange(scope, send, self._clock, echo_request_id=False)
        exchange.allowance = self._keyless
        try:
            if self._settings.keys:
                key = find_key(self._settings.keys, exchange.authorization)
                exchange.key, exchange.allowance = (key.name, self._allowances[key.name]) if key else (None, None)
            if exchange.allowance is None or exchange.allowance.admit(self._clock()) is not None:
                exchange.status, exchange.outcome = 403, "complete"
                await receive()  # websocket.connect; closing before accepting is answered with 403
                await send({"type": "websocket.close", "code": 1008})
                return
            exchange.status, exchange.outcome = 101, "complete"
            await self._app(scope, receive, exchange.send)
        except BaseException:
            exchange.outcome = "error"
            raise
        finally:
            exchange.book()
            if self._settings.access_log:
                write_line(exchange.fields())


class Exchange:
    """One request and its response, as far as the guard has to know them."""

    __slots__ = (
        "_clock",
        "_echo",
        "_send",
        "_started_at",
        "allowance",
        "authorization",
        "body",
        "completion_tokens",
        "content_length",
        "ended",
        "first_byte_s",
        "is_open",
        "key",
        "length_is_open",
        "method",
        "outcome",
        "prompt_tokens",
        "queued_s",
        "request_bytes",
        "request_id",
        "response_bytes",
        "route",
        "scope",
        "sent_id",
        "started",
        "status",
        "streams_events",
    )

    def __init__(self, scope: Message, send: Send, clock: Callable[[], float], *, echo_request_id: bool) -> None:
        self.scope, self._send, self._clock, self._echo = scope, send, clock, echo_request_id
        self.started, self._started_at = clock(), time.time()
        self.method: str = scope.get("method", "")
        self.route = route_of(scope)
        self.authorization = self.sent_id = b""
        self.content_length = 0
        chunked = False
        self.length_is_open = self.method not in ("GET", "HEAD", "OPTIONS")
        for name, value in scope["headers"]:
            if name == b"authorization":
                self.authorization = value
            elif name == b"content-length":
                self.content_length, self.length_is_open = int(value[:20]), chunked
            elif name == b"transfer-encoding":
                self.length_is_open = chunked = True
            elif name == b"x-request-id":
                self.sent_id = value
        self.is_open = self.method in ("GET", "HEAD") and self.route in OPEN_PATHS
        self.request_id = self.sent_id.decode() if _SANE_ID.fullmatch(self.sent_id) else uuid.uuid4().hex
        self.key: str | None = None
        self.allowance: Allowance | None = None
        self.body: list[bytes] | None = None
        self.request_bytes = self.content_length
        self.status = self.response_bytes = self.prompt_tokens = self.completion_tokens = 0
        self.first_byte_s: float | None = None
        self.queued_s: float | None = None
        self.streams_events = False
        self.ended = False
        self.outcome = ""

    def inner_scope(self) -> Message:
        """The scope with a request id that logs may show, and /ready as the health that it is."""
        scope = self.scope
        if self.sent_id.decode("latin-1") != self.request_id:
            others = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
            scope = {**scope, "headers": [*others, (b"x-request-id", self.request_id.encode())]}
        if self.route == "/ready":
            path = scope["path"].removesuffix("/ready") + "/health"
            scope = {**scope, "path": path, "raw_path": path.encode()}
        return scope

    async def send(self, message: Message) -> None:
        """Sends on, and counts; nothing after the end."""
        kind = message["type"]
        if kind == USAGE:
            self.prompt_tokens += message["prompt_tokens"]
            self.completion_tokens += message["completion_tokens"]
        elif self.ended:
            return
        elif kind == "http.response.body":
            body = message.get("body", b"")
            if body:
                if self.first_byte_s is None:
                    self.first_byte_s = self._clock() - self.started
                self.response_bytes += len(body)
            self.ended = not message.get("more_body", False)
            await self._send(message)
        elif kind == "http.response.start":
            self.status = message["status"]
            headers = list(message.get("headers", ()))
            self.streams_events = any(
                name == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers
            )
            if self.allowance is not None:
                headers += self.allowance.headers(self._clock())
            if self._echo and not any(name.lower() == b"x-request-id" for name, _ in headers):
                headers.append((b"x-request-id", self.request_id.encode()))
            await self._send({**message, "headers": headers})
        else:
            await self._send(message)

    async def refuse_size(self, max_request_mib: float) -> None:
        message = f"The request body is larger than {max_request_mib:g} MiB, the most that this server takes."
        await send_json(self.send, 413, error_body(message, "invalid_request_error", "request_too_large"))

    async def refuse_for_now(self, reason: str, code: str, retry_after_s: float) -> None:
        seconds = max(1, math.ceil(retry_after_s))
        message = f"Try again in {seconds} s: {reason}."
        body = error_body(message, "rate_limit_error", code)
        await send_json(self.send, 429, body, [(b"retry-after", str(seconds).encode())])

    async def end_late(self, timeout_s: float) -> None:
        """504 when nothing was sent yet, an error event in a stream of events; else the connection breaks off."""
        if self.ended:
            return
        self.outcome = "timeout"
        body = error_body(f"The request took longer than {timeout_s:g} s.", "timeout_error", "request_timeout")
        if not self.status:
            await send_json(self.send, 504, body)
        elif self.streams_events:
            events = b"data: " + body + b"\n\ndata: [DONE]\n\n"
            await self.send({"type": "http.response.body", "body": events})
        self.ended = True

    def reading(self, receive: Receive, limits: LimitsSection, *, keep: bool) -> Receive:
        """A `receive` that counts the body and refuses one that grows too large; `keep`: for the log."""
        self.request_bytes = 0
        self.body = [] if keep else None
        limit = limits.max_request_bytes

        async def counted() -> Message:
            if self.ended:
                return DISCONNECT
            message = await receive()
            if message["type"] == "http.request":
                chunk = message.get("body", b"")
                if self.body is not None and self.request_bytes < MAX_LOGGED_BODY_BYTES:
                    self.body.append(chunk)
                self.request_bytes += len(chunk)
                if self.request_bytes > limit:
                    await self.refuse_size(limits.max_request_mib)
                    return DISCONNECT  # whatever the app says to that is not sent
            return message

        return counted

    def book(self) -> None:
        """Spends the request's tokens."""
        tokens = self.prompt_tokens + self.completion_tokens
        if tokens and self.allowance is not None:
            self.allowance.book(tokens, self._clock())

    def fields(self) -> dict[str, Any]:
        """The line of the access log."""
        found: dict[str, Any] = {
            "time": timestamp(self._started_at),
            "request_id": self.request_id,
            "key": self.key,
            "method": self.method,
            "path": self.route,
            "status": self.status or (500 if self.outcome == "error" else CLIENT_CLOSED_REQUEST),
            "outcome": self.outcome or ("complete" if self.ended else "disconnect"),
            "queued_s": _rounded(self.queued_s),
            "first_byte_s": _rounded(self.first_byte_s),
            "seconds": _rounded(self._clock() - self.started),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "request_bytes": self.request_bytes,
            "response_bytes": self.response_bytes,
        }
        if self.body is not None:
            found["request"] = b"".join(self.body)[:MAX_LOGGED_BODY_BYTES].decode(errors="replace")
        return found


class Reader:
    """Reads ahead what a client sends, and is the app's `receive`.

    So a client that goes while its request waits is noticed, and what the app has left behind listening for a
    disconnect, as vLLM's routes do when they are cancelled, gets one at the end. Holds at most the body, whose size is
    limited before. task: done when the client has gone.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._messages: deque[Message] = deque()
        self._arrived = asyncio.Event()
        self.task = asyncio.create_task(self._read())

    async def __call__(self) -> Message:
        while not self._messages:
            self._arrived.clear()
            await self._arrived.wait()
        message = self._messages[0]
        if message["type"] != "http.disconnect":  # which is told again and again
            self._messages.popleft()
        return message

    def close(self) -> None:
        """Reads no more; from now on the client is gone."""
        self.task.cancel()
        self._messages = deque([DISCONNECT])
        self._arrived.set()

    async def _read(self) -> None:
        message: Message = {"type": ""}
        while message["type"] != "http.disconnect":
            message = await self._receive()
            self._messages.append(message)
            self._arrived.set()


def _heard(receive: Receive) -> Receive:
    """A `receive` that raises nothing: whatever the server raises, nothing more will come. Serve's Python proxy raises
    now and then that the request is cancelled."""

    async def heard() -> Message:
        try:
            return await receive()
        except Exception:  # whatever kind: the guard knows no server, and from here on the client is gone
            return DISCONNECT

    return heard


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
