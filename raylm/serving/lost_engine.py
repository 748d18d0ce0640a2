"""What becomes of a replica whose engine is dead: its process ends within half a second, and Serve starts another.

Until then it answers no new request at once. One that fails fast looks the least busy, so proxy and gateway would send
it more than the others.
"""

import asyncio
import logging
import os
from typing import Any

from raylm.serving.asgi import App, Message, Receive, Send, error_body, send_json

logger = logging.getLogger("ray.serve")  # the replica's log

_LOOK_S = 0.1
_FAREWELL_S = 0.25  # for the answers of requests that were at work, which say what has happened
_LAST_S = 0.1


class LostEngine:
    """ASGI middleware around an engine's app.

    engine: vLLM's client of it, which knows that it is dead as soon as its process is. hands_over: the caller asks
    another replica when this one is gone, as the gateway does; so errors that the engine's death has caused are kept
    back as well. Others are told in the end.
    """

    def __init__(self, app: App, engine: Any, *, hands_over: bool) -> None:
        self._app, self._engine, self._hands_over = app, engine, hands_over
        self._ending = asyncio.Event()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif self._engine.errored:
            await self._late(send)
        else:
            await self._app(scope, receive, self._without_late_errors(send) if self._hands_over else send)

    async def _late(self, send: Send) -> None:
        if not (self._hands_over or self._ending.is_set()):
            await self._ending.wait()
            body = error_body("The engine was lost.", "ServiceUnavailable", 503)
            await send_json(send, 503, body, [(b"retry-after", b"1")])
        else:  # also what comes at the very end: who has just been told so would be told again and again
            await _for_ever()

    def _without_late_errors(self, send: Send) -> Send:
        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 500 and self._engine.errored:
                await _for_ever()
            await send(message)

        return send_on

    async def end_with_engine(self) -> None:
        """Ends this process once the engine is dead. To be cancelled before the engine is ended as it should."""
        while not self._engine.errored:
            await asyncio.sleep(_LOOK_S)
        logger.error("The engine is dead: this replica ends, and Serve starts another.")
        await asyncio.sleep(_FAREWELL_S)
        self._ending.set()
        await asyncio.sleep(_LAST_S)
        os._exit(1)


async def _for_ever() -> None:
    """Until the process ends, or the request is cancelled."""
    await asyncio.Event().wait()
