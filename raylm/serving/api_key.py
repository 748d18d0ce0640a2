"""The API key: read on the driver, compared in the replica, and never sent between them.

What travels through Ray is the SHA-256 digest, so the key stands in no log, run file, command line or cluster state.
vLLM's own check guards /v1 only and leaves /metrics, /tokenize and others open; this one guards every route but health.
"""

import hashlib
import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from raylm.errors import ServingError

KEY_VARIABLE = "VLLM_API_KEY"
OPEN_PATHS = frozenset({"/health"})

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_UNAUTHORIZED = (
    b'{"error": {"message": "A valid API key is needed as bearer token.", '
    b'"type": "Unauthorized", "param": null, "code": 401}}'
)


def read_api_key(file: str | None) -> str | None:
    """The first line of `file`, else the variable VLLM_API_KEY as in vLLM, else None: no key is asked for.

    Raises ServingError when the file cannot be read or its first line is empty.
    """
    if file is None:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ServingError(
            f"api_key_file {file}", f"cannot be read: {reason}.", "Give a text file whose first line is the key."
        ) from None
    key = lines[0].strip() if lines else ""
    if not key:
        raise ServingError(f"api_key_file {file}", "has no key in its first line.", "Write the key there.")
    return key


def digest(key: str) -> bytes:
    """What may travel in place of the key."""
    return hashlib.sha256(key.encode()).digest()


class RequireKey:
    """ASGI middleware that answers 401 unless the request carries the key as a bearer token.

    Left alone are the health route, and CORS preflights: browsers send those without a key, and they reach no route.
    """

    def __init__(self, app: App, key_digest: bytes) -> None:
        self._app, self._digest = app, key_digest

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or self._is_open(scope) or self._has_key(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()  # websocket.connect; closing before accepting is answered with 403
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": _UNAUTHORIZED})

    def _is_open(self, scope: Message) -> bool:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        preflight = scope.get("method") == "OPTIONS" and any(
            name == b"access-control-request-method" for name, _ in scope["headers"]
        )
        return path in OPEN_PATHS or preflight

    def _has_key(self, scope: Message) -> bool:
        for name, value in scope["headers"]:
            if name == b"authorization":
                scheme, _, token = value.partition(b" ")
                return scheme.lower() == b"bearer" and hmac.compare_digest(
                    hashlib.sha256(token.strip()).digest(), self._digest
                )
        return False
