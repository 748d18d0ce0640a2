"""ASGI through a stream of messages, with small ASGI apps in place of the engine's."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from raylm.serving.asgi import Message, Receive, Send
from raylm.serving.relay import Visits, messages_of, request_of

START = {"type": "http.response.start", "status": 200, "headers": []}
SCOPE: Message = {
    "type": "http",
    "method": "POST",
    "path": "/v1/completions",
    "query_string": b"a=1",
    "headers": [[b"content-type", b"application/json"]],
    "state": object(),
    "extensions": {"http.response.trailers": {}},
    "app": object(),
}


def run(steps: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(steps(), 10))


def body(text: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": text, "more_body": more}


async def collected(app: Any, content: bytes = b"") -> list[list[Message]]:
    return [batch async for batch in messages_of(app, request_of(SCOPE, content))]


def test_only_plain_values_travel() -> None:
    request = request_of(SCOPE, b"text")
    assert request.pop("id") != request_of(SCOPE, b"text")["id"]
    assert request == {
        "scope": {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "query_string": b"a=1",
            "headers": [(b"content-type", b"application/json")],
        },
        "body": b"text",
    }


def test_the_app_gets_the_request_and_the_caller_its_answer() -> None:
    async def app(scope: Message, receive: Receive, send: Send) -> None:
        message = await receive()
        assert (scope["path"], message["more_body"]) == ("/v1/completions", False)
        await send(START)
        await send(body(message["body"].upper(), more=False))

    async def steps() -> None:
        assert await collected(app, b"text") == [[START, body(b"TEXT", more=False)]]

    run(steps)


def test_the_first_chunk_is_not_held_back_and_late_ones_are_joined() -> None:
    """The app sends all it has between two reads of the caller; what had to wait comes as one body."""
    go = asyncio.Event()

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await send(START)
        await send(body(b"a"))
        await go.wait()
        for part in (b"b", b"c", b"d"):
            await send(body(part))
        await send(body(b"", more=False))

    async def steps() -> None:
        messages = messages_of(app, request_of(SCOPE, b""))
        assert await anext(messages) == [START, body(b"a")]
        go.set()
        assert await anext(messages) == [body(b"bcd", more=False)]
        with pytest.raises(StopAsyncIteration):
            await anext(messages)

    run(steps)


def test_messages_of_other_types_pass_untouched_and_in_order() -> None:
    usage = {"type": "raylm.usage", "prompt_tokens": 3, "completion_tokens": 4}

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await send(START)
        await send(body(b"a", more=False))
        await send(usage)

    async def steps() -> None:
        assert await collected(app) == [[START, body(b"a", more=False), usage]]

    run(steps)


def test_closing_the_stream_tells_the_app_that_the_client_has_left() -> None:
    """Known fault W06. As vLLM's routes that do not stream: a task of its own, which only the message ends."""
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("work")

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await receive()
        await send(START)
        task = asyncio.ensure_future(work())
        ended.append((await receive())["type"])
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def steps() -> None:
        messages = messages_of(app, request_of(SCOPE, b""))
        assert await anext(messages) == [START]
        await messages.aclose()  # type: ignore[attr-defined]
        assert ended == ["http.disconnect", "work"]

    run(steps)


def test_a_cancelled_caller_cancels_the_app() -> None:
    ended = asyncio.Event()

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def steps() -> None:
        task = asyncio.ensure_future(collected(app))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()

    run(steps)


def test_what_the_app_raises_comes_after_what_it_sent() -> None:
    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await send(START)
        raise ValueError("no")

    async def steps() -> None:
        messages = messages_of(app, request_of(SCOPE, b""))
        assert await anext(messages) == [START]
        with pytest.raises(ValueError, match="no"):
            await anext(messages)

    run(steps)


def usage(completion_tokens: int) -> Message:
    return {"type": "raylm.usage", "prompt_tokens": 3, "completion_tokens": completion_tokens}


@pytest.mark.parametrize("how", ["left", "closed", "cancelled", "cancelled twice"])
def test_what_a_request_has_cost_is_known_whatever_becomes_of_its_call(how: str) -> None:
    """Whole answers: until they are made, nothing is sent that could say it."""

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await receive()
        await send(usage(1))
        try:
            await receive()
            await asyncio.sleep(0.05 if how == "left" else 5)
        finally:
            await asyncio.sleep(0.01)
            await send(usage(4))

    async def steps() -> None:
        visits, request = Visits(), request_of(SCOPE, b"")

        async def call() -> list[list[Message]]:
            return [batch async for batch in visits.messages(app, request)]

        if how == "closed":
            messages = visits.messages(app, request)
            await anext(messages)
            await messages.aclose()  # type: ignore[attr-defined]
        else:
            task = asyncio.ensure_future(call())
            await asyncio.sleep(0.01)
            if how != "left":
                task.cancel()
            if how == "cancelled twice":
                await asyncio.sleep(0.01)
                task.cancel()
        assert await visits.leave(request["id"]) == {"prompt_tokens": 6, "completion_tokens": 5}
        if how == "left":  # and heard by the call too, which ends by itself
            assert await task == [[usage(1)], [usage(4)]]
        assert await visits.leave("another") is None

    run(steps)


def test_requests_that_are_over_are_forgotten_in_the_end() -> None:
    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await send(usage(1))

    async def steps() -> None:
        visits = Visits()
        requests = [request_of(SCOPE, b"") for _ in range(1002)]
        for request in requests:
            assert [batch async for batch in visits.messages(app, request)] == [[usage(1)]]
        known = [await visits.leave(request["id"]) for request in requests]
        assert known == [None, None] + [{"prompt_tokens": 3, "completion_tokens": 1}] * 1000

    run(steps)
