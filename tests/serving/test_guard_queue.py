"""Requests that wait for a place, in real asyncio."""

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylm.serving.gate import Gate
from tests.serving.guard_support import Slow, ask, behind, echo, read_body, run, settled


def test_more_than_the_queue_holds_is_429_at_once() -> None:
    async def test() -> None:
        slow = Slow()
        app = behind(slow, max_concurrent=2, max_queue=3)
        tasks = []
        for number in range(5):
            tasks.append(asyncio.create_task(ask(app, body=[b"a", str(number).encode()], x_request_id=str(number))))
            await settled()
        assert slow.running == 2
        refused = await ask(app)
        assert refused.status == 429
        assert (refused.error["type"], refused.error["code"]) == ("rate_limit_error", "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        slow.go_on.set()
        answers = await asyncio.gather(*tasks)
        assert [answer.body for answer in answers] == [b"a0", b"a1", b"a2", b"a3", b"a4"]
        assert slow.order == ["0", "1", "2", "3", "4"]
        assert slow.most == 2
        assert (await ask(app)).status == 200

    run(test())


def test_listing_is_not_held_by_a_full_server() -> None:
    async def test() -> None:
        slow = Slow()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await (slow if scope["method"] == "POST" else echo)(scope, receive, send)

        guard = behind(app, max_concurrent=1, max_queue=0)
        held = asyncio.create_task(ask(guard))
        await settled()
        assert (await ask(guard)).status == 429
        assert (await ask(guard, "/metrics", method="GET")).status == 200
        slow.go_on.set()
        assert (await held).status == 200

    run(test())


@pytest.mark.parametrize("how", ["disconnect", "cancel"])
def test_who_goes_while_waiting_frees_the_place(how: str) -> None:
    """Known fault W06. A server tells of it by a message, Serve by cancelling the request."""

    async def test() -> None:
        slow = Slow()
        app = behind(slow, max_concurrent=1, max_queue=1)
        held = asyncio.create_task(ask(app, x_request_id="held"))
        await settled()
        gone = asyncio.Event()
        waiting = asyncio.create_task(ask(app, gone=gone, x_request_id="waiting"))
        await settled()
        assert (await ask(app)).status == 429
        gone.set() if how == "disconnect" else waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled() if how == "cancel" else waiting.result().messages == []
        later = asyncio.create_task(ask(app, x_request_id="later"))
        await settled()
        slow.go_on.set()
        assert [(await held).status, (await later).status] == [200, 200]
        assert slow.order == ["held", "later"]

    run(test())


def test_a_client_that_goes_after_waiting_is_noticed_by_the_app() -> None:
    async def test() -> None:
        noticed = asyncio.Event()
        slow = Slow()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if dict(scope["headers"])[b"x-request-id"] == b"held":
                await slow(scope, receive, send)
                return
            assert await read_body(receive) == b"{}"
            assert (await receive())["type"] == "http.disconnect"
            assert (await receive())["type"] == "http.disconnect"
            noticed.set()

        guard = behind(app, max_concurrent=1)
        held = asyncio.create_task(ask(guard, x_request_id="held"))
        await settled()
        gone = asyncio.Event()
        waiting = asyncio.create_task(ask(guard, gone=gone))
        await settled()
        slow.go_on.set()
        await held
        gone.set()
        await waiting
        assert noticed.is_set()

    run(test())


@settings(deadline=None)
@given(data=st.data())
def test_places_are_never_lost_nor_given_twice(data: st.DataObject) -> None:
    """Requests enter, leave, wait and give up in any order; a list of who is in and who waits is the reference."""

    async def test() -> None:
        places, queue_size = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 3))
        gate = Gate(places, queue_size)
        inside, waiting = 0, []
        for _ in range(data.draw(st.integers(1, 40))):
            if data.draw(st.booleans()):
                if gate.enter():
                    assert inside < places
                    assert not waiting
                    inside += 1
                elif (place := gate.queue()) is not None:
                    assert inside == places
                    assert len(waiting) < queue_size
                    waiting.append(place)
                else:
                    assert (inside, len(waiting)) == (places, queue_size)
            elif waiting and data.draw(st.booleans()):
                gate.give_up(waiting.pop(data.draw(st.integers(0, len(waiting) - 1))))
            elif inside:
                gate.leave(data.draw(st.floats(0, 100)))
                if waiting:
                    place = waiting.pop(0)
                    assert place.done()
                    if data.draw(st.booleans()):  # goes at the very moment it is let in
                        gate.give_up(place)
                        if waiting:
                            assert waiting.pop(0).done()
                        else:
                            inside -= 1
                else:
                    inside -= 1
            assert (gate.running, gate.waiting) == (inside, len(waiting))
            assert not any(place.done() for place in waiting)
            assert gate.retry_after_s() >= 1

    asyncio.run(test())
