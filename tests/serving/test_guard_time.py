"""Requests that take too long."""

import asyncio
import json
from typing import Any

import pytest

from tests.serving.guard_support import Slow, ask, behind, read_body, run


@pytest.mark.parametrize("waiting", [False, True])
def test_a_late_request_is_504_and_its_work_cancelled(waiting: bool) -> None:
    async def test() -> None:
        slow = Slow()
        app = behind(slow, request_timeout_s=0.2, max_concurrent=1 if waiting else None)
        first = asyncio.create_task(ask(app))
        second = asyncio.create_task(ask(app))
        for answer in (await first, await second):
            assert answer.status == 504
            assert (answer.error["type"], answer.error["code"]) == ("timeout_error", "request_timeout")
            assert "0.2 s" in answer.error["message"]
        assert slow.running == 0
        assert slow.most == (1 if waiting else 2)
        slow.go_on.set()
        assert (await ask(app)).status == 200

    run(test())


@pytest.mark.parametrize("kind", [b"text/event-stream; charset=utf-8", b"text/plain"])
def test_a_late_stream_ends_with_an_error_event(kind: bytes) -> None:
    ended = []

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)
            await send({"type": "http.response.body", "body": b"data: late\n\n", "more_body": True})

    answer = run(ask(behind(app, request_timeout_s=0.1)))
    assert answer.status == 200
    assert ended
    if kind == b"text/plain":  # nothing can be added to it: the server sees a response without end, and hangs up
        assert all(message.get("more_body", True) for message in answer.messages)
        return
    *_, event, done, rest = answer.body.decode().split("\n\n")
    assert json.loads(event.removeprefix("data: "))["error"]["code"] == "request_timeout"
    assert (done, rest) == ("data: [DONE]", "")
    assert answer.messages[-1].get("more_body", False) is False


@pytest.mark.parametrize("waiting", [False, True])
def test_what_a_late_request_leaves_behind_hears_of_the_end(waiting: bool) -> None:
    """As vLLM's routes do: a task of their own listens for a disconnect, and is not cancelled with them."""

    async def test() -> None:
        listening: list[asyncio.Task[Any]] = []

        async def app(_scope: Any, receive: Any, _send: Any) -> None:
            await read_body(receive)
            listening.append(asyncio.create_task(receive()))
            await asyncio.sleep(60)

        guard = behind(app, request_timeout_s=0.2, max_concurrent=1 if waiting else None)
        first = asyncio.create_task(ask(guard))
        second = asyncio.create_task(ask(guard))
        assert [(await first).status, (await second).status] == [504, 504]
        assert [message["type"] for message in await asyncio.gather(*listening)] == ["http.disconnect"] * len(listening)
        assert len(listening) >= (1 if waiting else 2)  # the place of the first may go to the second in its last moment

    run(test())


def test_an_app_that_ignores_being_cancelled_is_late_all_the_same() -> None:
    async def app(_scope: Any, _receive: Any, _send: Any) -> None:
        with pytest.raises(asyncio.CancelledError):
            await asyncio.sleep(60)

    assert run(ask(behind(app, request_timeout_s=0.1))).status == 504


def test_a_timeout_of_the_apps_own_stays_its_own() -> None:
    async def app(_scope: Any, _receive: Any, _send: Any) -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        run(ask(behind(app, request_timeout_s=10)))
