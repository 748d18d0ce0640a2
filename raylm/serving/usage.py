"""Exact token counts of each request, taken from the engine's own request states; and its engine requests end with it.

vLLM's output processor keeps one state per engine request, with the prompt's length and the tokens generated so far.
Holding on to the states that a request has made costs nothing per token and counts what was processed, streamed or
not, finished or aborted. These are internals of vLLM 0.32: what relies on them is here.
"""

import asyncio
from contextvars import ContextVar
from typing import Any

from raylm.serving.asgi import App, Message, Receive, Send
from raylm.serving.model_counts import ModelCounts

USAGE = "raylm.usage"
TOKENS = ("prompt_tokens", "completion_tokens")
"""What a message of type USAGE counts."""


class EngineRequests:
    """The engine requests that one HTTP request has made."""

    __slots__ = ("over", "states")

    def __init__(self) -> None:
        self.states: list[Any] = []
        self.over = False

    def count(self) -> dict[str, int]:
        """Tokens so far; the answers to one prompt (n) share it."""
        prompts = sum(state.prompt_len for state in self.states if state.request_index == 0)
        decoders = [state.detokenizer for state in self.states if state.detokenizer is not None]  # None: embeddings
        return {"prompt_tokens": prompts, "completion_tokens": sum(each.num_output_tokens() for each in decoders)}


_CURRENT: ContextVar[EngineRequests | None] = ContextVar("raylm_engine_requests", default=None)


def watch(engine: Any) -> None:
    """From now on each engine request is noted in the context of the HTTP request that makes it.

    engine: an AsyncLLM.
    """
    processor = engine.output_processor
    add_request = processor.add_request

    def add_and_note(request: Any, *args: Any, **options: Any) -> None:
        current = _CURRENT.get()
        if current is not None and current.over:
            raise asyncio.CancelledError  # a handler that has outlived its request
        known = request.request_id in processor.request_states  # more input for a request that is streamed in
        add_request(request, *args, **options)
        if current is not None and not known:
            current.states.append(processor.request_states[request.request_id])

    processor.add_request = add_and_note


class Metered:
    """ASGI middleware right around vLLM's app: says after each response what it has cost.

    The message `{"type": "raylm.usage", "prompt_tokens": n, "completion_tokens": m}` is for our own middleware outside
    of it, which does not send it on. When a request is cancelled its engine requests are aborted: vLLM's routes, when
    they are cancelled while they wait for a whole answer, leave it to be generated.

    along: say before each piece of a response too what has come since, for a listener who may not hear the end: over a
    handle, what a cancelled call still sends is lost. counts: told of each engine request when its response is over.
    """

    def __init__(self, app: App, engine: Any, *, along: bool = False, counts: ModelCounts | None = None) -> None:
        self._app, self._engine, self._along, self._counts = app, engine, along, counts

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        current = EngineRequests()
        token = _CURRENT.set(current)
        said = {"prompt_tokens": 0, "completion_tokens": 0}

        async def say() -> None:
            count = current.count()
            since = {key: count[key] - said[key] for key in count}
            if any(since.values()):
                said.update(count)
                await send({"type": USAGE, **since})

        async def send_along(message: Message) -> None:
            if message["type"] == "http.response.body":
                await say()
            await send(message)

        try:
            await self._app(scope, receive, send_along if self._along else send)
        except BaseException:
            current.over = True
            await self._abort(current)
            raise
        finally:
            _CURRENT.reset(token)
            if self._counts is not None:
                self._counts.add(current.states)
            await say()

    async def _abort(self, requests: EngineRequests) -> None:
        running = self._engine.output_processor.request_states
        unfinished = [state for state in requests.states if state.request_id in running]
        # vLLM forgets a parent (of n answers) only when it is aborted by its own id.
        ids = dict.fromkeys((state.parent_req or state).request_id for state in unfinished)
        if ids:
            await self._engine.abort(list(ids), internal=True)
