"""What stands around Gradio's app: only the routes a chat needs, no other site's requests, and a content policy.

Gradio brings routes for uploads, files, proxying, monitoring and more. The page uses none of them, so they are not
there. The policy lets the browser load nothing from anywhere else and run no script but the page's own: an answer
that smuggles in a script or a picture of another server has no effect.
"""

import json
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

MAX_BODY_BYTES = 8 * 2**20

_API = "/gradio_api"
_ROUTES = re.compile(
    r"/|/config|/theme\.css|/robots\.txt|/favicon\.ico|/(?:assets|static|svelte)/.+|"
    rf"{_API}/(?:info|app_id|startup-events|reset|cancel|queue/join|queue/data|heartbeat/[^/]+)"
)
_SCRIPT = re.compile(rb"<script\b")
_HEAD_END = b"</head>"
_ICON = b'<link rel="icon" href="./favicon.ico">'  # else browsers ask the API for one
_MANIFEST = re.compile(rb"<link rel=\"manifest\"[^>]*>")  # Gradio's lies at the root of the site, which is the API's


def content_policy(nonce: str) -> str:
    """The Content-Security-Policy of the page. Gradio compiles the handlers it is given: hence 'unsafe-eval'."""
    return (
        f"default-src 'none'; script-src 'self' 'nonce-{nonce}' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
        "base-uri 'self'; form-action 'none'; frame-ancestors 'none'"
    )


class PageGuard:
    """ASGI middleware around Gradio's app.

    script: JavaScript that stands in the page before Gradio's. It may use no `</script>`.
    """

    def __init__(self, app: App, script: str) -> None:
        self._app, self._script = app, script.encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path == "":
            # The page's own links are relative to /chat/. The target is too, so it holds behind any proxy.
            await _answer(send, 307, b"", [(b"location", scope["path"].rsplit("/", 1)[-1].encode() + b"/")])
        elif not _ROUTES.fullmatch(path) or ".." in path:
            await _answer(send, 404, b"The chat page has no such route.")
        elif path.startswith(_API) and _is_foreign(headers):
            await _answer(send, 403, b"Requests from other sites are refused.")
        elif int(headers.get("content-length") or 0) > MAX_BODY_BYTES:
            await _answer(send, 413, b"The conversation is too long.")
        elif path == "/" and scope["method"] == "GET":
            await self._page(scope, receive, send)
        elif path == f"{_API}/queue/join":
            body = await _whole(receive)
            if body is None or _names_a_file(body):
                await _answer(send, 400, b"This is no event of the chat page.")
            else:
                await self._app(scope, _replayed(body, receive), _without_cors(send))
        else:
            await self._app(scope, _limited(receive), _without_cors(send))

    async def _page(self, scope: Message, receive: Receive, send: Send) -> None:
        """The HTML page, with our script in it, and a nonce on every script that stands in it."""
        kept = [(name, value) for name, value in scope["headers"] if name.lower() != b"accept-encoding"]
        status, body = 500, b""

        async def collect(message: Message) -> None:
            nonlocal status, body
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                body += message.get("body", b"")

        await self._app({**scope, "headers": kept}, receive, collect)
        nonce = secrets.token_urlsafe(16)
        own = _ICON + b"<script>" + self._script + b"</script>" + _HEAD_END
        body = _MANIFEST.sub(b"", body).replace(_HEAD_END, own, 1)
        body = _SCRIPT.sub(b'<script nonce="' + nonce.encode() + b'"', body)
        policy = (b"content-security-policy", content_policy(nonce).encode())
        await _answer(send, status, body, [policy], content_type=b"text/html; charset=utf-8")


async def _answer(
    send: Send,
    status: int,
    body: bytes,
    headers: list[tuple[bytes, bytes]] | None = None,
    *,
    content_type: bytes = b"text/plain; charset=utf-8",
) -> None:
    own = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
    own += [(b"cache-control", b"no-store"), *_HARDENING]
    await send({"type": "http.response.start", "status": status, "headers": [*own, *(headers or [])]})
    await send({"type": "http.response.body", "body": body})


_HARDENING = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]


def _is_foreign(headers: dict[str, str]) -> bool:
    """True for what a browser sends on behalf of another site's page."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = headers.get("origin")  # browsers leave the other header out on plain HTTP addresses but loopback
    hosts = (headers.get("host"), headers.get("x-forwarded-host"))
    return origin is not None and urlsplit(origin).netloc not in hosts


def _limited(receive: Receive) -> Receive:
    """Cuts off a body that comes in chunks without a length, once it is too long."""
    taken = 0

    async def wrapped() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        return {"type": "http.disconnect"} if taken > MAX_BODY_BYTES else message

    return wrapped


async def _whole(receive: Receive) -> bytes | None:
    """The body of a request; None when it is too long or breaks off."""
    parts, limited, more = [], _limited(receive), True
    while more:
        message = await limited()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A body that was read already, then what comes after it."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def wrapped() -> Message:
        return pending.pop() if pending else await receive()

    return wrapped


def _names_a_file(body: bytes) -> bool:
    """True for an event with a file in its values, which Gradio would fetch or copy before any code of ours; the page
    has none. True as well for what is no event at all."""
    try:
        event = json.loads(body)
    except (ValueError, RecursionError):
        return True
    pending: list[Any] = [event.get("data")] if isinstance(event, dict) else [{"meta": 0}]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if "meta" in value or "path" in value:
                return True
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)
    return False


def _without_cors(send: Send) -> Send:
    """Gradio answers other origins with headers that let them read; ours are not read."""

    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = [pair for pair in message.get("headers", []) if not pair[0].lower().startswith(b"access-control-")]
            message = {**message, "headers": [*kept, *_HARDENING]}
        await send(message)

    return wrapped
