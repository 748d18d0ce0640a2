"""Requests of an engine that is dead, until the process of its replica ends."""

import asyncio
from typing import Any

import pytest

from raylm.serving.asgi import Message, Receive, Send, send_json
from raylm.serving.lost_engine import LostEngine

HTTP: Message = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}


class Engine:
    errored = False


async def nothing() -> Message:
    raise AssertionError


class Outside:
    """Sends requests through the middleware to an app that fails when the engine does. ended: what the process ended
    with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, hands_over: bool) -> None:
        self.engine, self.died, self.ended = Engine(), asyncio.Event(), []  # type: ignore[var-annotated]
        monkeypatch.setattr("os._exit", self.ended.append)
        self.lost = LostEngine(self._app, self.engine, hands_over=hands_over)
        self.watching = asyncio.ensure_future(self.lost.end_with_engine())

    async def _app(self, scope: Message, receive: Receive, send: Send) -> None:
        await self.died.wait()
        await send_json(send, 500, b"{}")

    def ask(self) -> "tuple[asyncio.Future[None], list[Any]]":
        answer: list[Any] = []

        async def send(message: Message) -> None:
            answer.append(message)

        return asyncio.ensure_future(self.lost(dict(HTTP), nothing, send)), answer

    def kill(self) -> None:
        self.engine.errored = True
        self.died.set()


@pytest.mark.parametrize("hands_over", [False, True])
def test_what_comes_late_is_not_answered_before_the_end(hands_over: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        outside = Outside(monkeypatch, hands_over=hands_over)
        at_work, answer = outside.ask()
        await asyncio.sleep(0.2)
        assert not outside.ended
        outside.kill()
        late, late_answer = outside.ask()
        await asyncio.sleep(0.05)
        assert not outside.ended
        assert not late_answer
        assert [message.get("status") for message in answer] == ([] if hands_over else [500, None])
        await asyncio.wait_for(outside.watching, 5)
        assert outside.ended == [1]
        if hands_over:
            assert not late_answer
        else:
            start, body = late_answer
            assert start["status"] == 503
            assert (b"retry-after", b"1") in start["headers"]
            assert b"The engine was lost" in body["body"]
        for task in (at_work, late):
            task.cancel()

    asyncio.run(run())


def test_an_error_of_a_living_engine_goes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        outside = Outside(monkeypatch, hands_over=True)
        task, answer = outside.ask()
        outside.died.set()
        await task
        assert answer[0]["status"] == 500
        outside.watching.cancel()

    asyncio.run(run())
