"""What stands before the routes, around small apps: no engine, real asyncio, and a given clock where time counts."""

import asyncio
import json
import logging
import pickle
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylm.config.limits import LimitsSection
from raylm.config.load import load_config
from raylm.config.serving import ServeArgs
from raylm.errors import ConfigError
from raylm.serving import access_log
from raylm.serving.api_key import ApiKey, digest
from raylm.serving.buckets import Allowance, Bucket, duration
from raylm.serving.gate import Gate
from raylm.serving.guard import GuardSettings, guard_settings, guarded

KEYS = (ApiKey("alice", digest("al1ce")), ApiKey("bob", digest("b0b"), requests_per_minute=2, tokens_per_minute=100))


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Answer:
    """What a request got."""

    messages: list[Any] = field(default_factory=list)

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages[1:])

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.body)["error"]


async def ask(
    app: Any,
    path: str = "/v1/completions",
    *,
    method: str = "POST",
    key: str | None = None,
    body: list[bytes] | None = None,
    length: int | None = None,
    gone: asyncio.Event | None = None,
    root_path: str = "",
    **headers: str,
) -> Answer:
    """One request as a server hands it to an app. body: its chunks; length: what `content-length` says, if anything."""
    answer = Answer()
    chunks = [b"{}"] if body is None else body
    messages = [
        {"type": "http.request", "body": chunk, "more_body": number < len(chunks) - 1}
        for number, chunk in enumerate(chunks)
    ]
    gone = gone or asyncio.Event()

    async def receive() -> Any:
        if messages:
            return messages.pop(0)
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        answer.messages.append(message)

    all_headers = {"content-length": str(length)} if length is not None else {}
    if key:
        all_headers["authorization"] = f"Bearer {key}"
    all_headers |= {name.replace("_", "-"): value for name, value in headers.items()}
    scope = {
        "type": "http",
        "path": path,
        "root_path": root_path,
        "method": method,
        "headers": [(name.encode(), value.encode()) for name, value in all_headers.items()],
    }
    await app(scope, receive, send)
    return answer


async def read_body(receive: Any) -> bytes:
    """As Starlette reads it."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError("the client has gone")
        body += message["body"]
        if not message["more_body"]:
            return body


async def respond(send: Any, *chunks: bytes, status: int = 200, kind: bytes = b"text/plain") -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
    for number, chunk in enumerate(chunks):
        await send({"type": "http.response.body", "body": chunk, "more_body": number < len(chunks) - 1})


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the request's body, and with the path it saw in a header."""
    body = await read_body(receive) if scope["method"] == "POST" else b""
    start = {"type": "http.response.start", "status": 200, "headers": [(b"x-path", scope["path"].encode())]}
    await send(start)
    await send({"type": "http.response.body", "body": body})


def costing(prompt_tokens: int, completion_tokens: int) -> Any:
    """An app whose requests cost so many tokens."""

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await respond(send, b"ok")
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
        await send({"type": "raylm.usage", **usage})

    return app


def behind(
    app: Any, *, clock: Any = None, keys: Any = (), log: bool = False, prompts: bool = False, **limits: Any
) -> Any:
    settings = GuardSettings(keys, LimitsSection(**limits), log, prompts)
    return guarded(app, settings, **({"clock": clock} if clock else {}))


Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture
def run() -> Run:
    return lambda coroutine: asyncio.run(asyncio.wait_for(coroutine, 20))


# Keys


@pytest.mark.parametrize(
    "path", ["/v1/models", "/metrics", "/tokenize", "/docs", "/ping", "/health/", "/v1/../health", "/x/ready"]
)
def test_every_route_but_health_needs_a_key(run: Run, path: str) -> None:
    """Known fault Z06."""
    app = behind(echo, keys=KEYS)
    for wrong in ({}, {"key": "wrong"}, {"authorization": "Basic al1ce"}, {"authorization": "al1ce"}):
        answer = run(ask(app, path, method="GET", **wrong))
        assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert answer.error["code"] == 401
    for key in ("al1ce", "b0b"):
        assert run(ask(app, path, method="GET", key=key)).status == 200


def test_health_and_ready_are_open_also_below_a_route_prefix(run: Run) -> None:
    app = behind(echo, keys=KEYS)
    for path, root in (("/health", ""), ("/ready", ""), ("/llm/health", "/llm"), ("/llm/ready", "/llm")):
        answer = run(ask(app, path, method="GET", root_path=root))
        assert (answer.status, answer.headers["x-path"]) == (200, f"{root}/health")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_health_is_open_for_reading_only(run: Run, method: str) -> None:
    app = behind(echo, keys=KEYS)
    for path in ("/health", "/ready"):
        assert run(ask(app, path, method=method)).status == 401
        assert run(ask(app, path, method="HEAD")).status == 200


def test_only_a_cors_preflight_passes_without_key(run: Run) -> None:
    app = behind(echo, keys=KEYS)
    asked = {"access_control_request_method": "POST", "origin": "https://page.example"}
    assert run(ask(app, method="OPTIONS", **asked)).status == 200
    for name in asked:  # half of one is answered by a route
        assert run(ask(app, "/metrics", method="OPTIONS", **{name: asked[name]})).status == 401
    assert run(ask(app, method="OPTIONS")).status == 401
    assert run(ask(app, method="GET", **asked)).status == 401


def test_a_websocket_needs_a_key(run: Run) -> None:
    sent: list[Any] = []

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    for value in (b"Bearer wrong", b"Bearer al1ce"):
        scope = {"type": "websocket", "path": "/v1/realtime", "headers": [(b"authorization", value)]}
        run(behind(app, keys=KEYS)(scope, receive, send))
    assert sent == ["websocket.close", "websocket.accept"]


def test_the_settings_of_a_server_travel_without_keys(tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").write_text("- {name: alice, key: al1ce, requests_per_minute: 3}")
    args = ServeArgs.model_validate(
        {
            "model": "m",
            "api_key_file": str(tmp_path / "keys.yaml"),
            "limits": {"max_concurrent": 2},
            "access_log": False,
        }
    )
    settings = guard_settings(args)
    sent = pickle.dumps(settings)
    assert b"al1ce" not in sent
    assert pickle.loads(sent) == settings  # noqa: S301
    assert settings.keys == (ApiKey("alice", digest("al1ce"), requests_per_minute=3),)
    assert (settings.limits.max_concurrent, settings.access_log, settings.log_prompts) == (2, False, False)
    assert settings.or_key(KEYS[0]) is settings
    assert GuardSettings().or_key(KEYS[0]).keys == (KEYS[0],)


# Rates


@settings(deadline=None)
@given(
    per_minute=st.integers(1, 5000),
    steps=st.lists(st.tuples(st.floats(0, 90), st.integers(1, 300)), min_size=1, max_size=60),
)
def test_a_bucket_gives_no_more_than_its_minute_and_what_flowed_in(
    per_minute: int, steps: list[tuple[float, int]]
) -> None:
    """Against the definition: spent <= capacity + rate x time, for every span of time; the advised wait is enough."""
    bucket, now, spent = Bucket(per_minute, 0.0), 0.0, []
    for wait, amount in steps:
        now += wait
        before = bucket.balance(now)
        assert before <= per_minute
        if before >= amount:
            bucket.spend(amount, now)
            spent.append((now, amount))
        elif amount <= per_minute:
            later = now + bucket.seconds_until(amount, now)
            assert bucket.balance(later) >= amount - 1e-6
            now = later
    for start in range(len(spent)):
        total = 0
        for at, amount in spent[start:]:
            total += amount
            assert total <= per_minute + (at - spent[start][0]) * per_minute / 60 + 1e-6


@settings(deadline=None)
@given(costs=st.lists(st.integers(1, 500), min_size=1, max_size=30))
def test_tokens_are_paid_afterwards_and_a_debt_is_waited_for(costs: list[int]) -> None:
    allowance, now, booked = Allowance(None, 600, 0.0), 0.0, 0
    for cost in costs:
        refusal = allowance.admit(now)
        if refusal is not None:
            assert allowance.admit(now + refusal.retry_after_s * 0.99) is not None
            now += refusal.retry_after_s + 1e-6
            assert allowance.admit(now) is None
        allowance.book(cost, now)
        booked += cost
        assert booked <= 600 + now * 10 + cost  # one request may run into debt, never two


def test_a_refused_request_costs_nothing() -> None:
    allowance = Allowance(2, 10, 0.0)
    assert allowance.admit(0.0) is None
    allowance.book(100, 0.0)
    for _ in range(5):
        refusal = allowance.admit(0.0)
        assert refusal is not None
        assert "10 tokens per minute" in refusal.reason
    assert dict(allowance.headers(0.0))[b"x-ratelimit-remaining-requests"] == b"1"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"),
        (0.0171, "18ms"),
        (1, "1s"),
        (1.42, "1.5s"),
        (59.95, "60s"),
        (60, "1m0s"),
        (359.5, "6m0s"),
        (3601, "60m1s"),
    ],
)
def test_durations_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_each_key_has_its_own_requests_and_is_told_when_to_come_back(run: Run) -> None:
    clock = Clock()
    app = behind(echo, keys=KEYS, clock=clock, requests_per_minute=1)
    first, second, third = (run(ask(app, key="b0b")) for _ in range(3))
    assert [answer.status for answer in (first, second, third)] == [200, 200, 429]
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in (first, second, third)] == ["1", "0", "0"]
    assert third.headers["x-ratelimit-reset-requests"] == "1m0s"
    assert third.headers["retry-after"] == "30"
    assert third.error["type"] == "rate_limit_error"
    assert third.error["code"] == "rate_limit_exceeded"
    assert "2 requests per minute" in third.error["message"]
    assert run(ask(app, key="al1ce")).status == 200
    assert run(ask(app, key="al1ce")).status == 429  # the limit of keys without one of their own
    assert run(ask(app, "/v1/models", method="GET", key="b0b")).status == 200  # listing costs nothing
    clock.now = 29.9
    assert run(ask(app, key="b0b")).headers["retry-after"] == "1"
    clock.now = 30.0
    assert run(ask(app, key="b0b")).status == 200


def test_tokens_are_booked_on_the_key_that_used_them(run: Run) -> None:
    clock = Clock()
    app = behind(costing(30, 90), keys=KEYS, clock=clock)
    first = run(ask(app, key="b0b"))
    assert [message["type"] for message in first.messages] == ["http.response.start", "http.response.body"]
    assert first.headers["x-ratelimit-remaining-tokens"] == "100"  # before its own cost was known
    second = run(ask(app, key="b0b"))
    assert (second.status, second.headers["retry-after"]) == (429, "13")  # 21 of 100 a minute
    assert (second.headers["x-ratelimit-limit-tokens"], second.headers["x-ratelimit-remaining-tokens"]) == ("100", "0")
    assert "x-ratelimit-limit-tokens" not in run(ask(app, key="al1ce")).headers
    clock.now = 12.7
    assert run(ask(app, key="b0b")).status == 200


def test_without_keys_the_rates_hold_for_all_clients_together(run: Run) -> None:
    app = behind(echo, clock=Clock(), requests_per_minute=2)
    assert [run(ask(app)).status for _ in range(3)] == [200, 200, 429]


def test_tokens_of_a_failed_request_count_too(run: Run) -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        try:
            raise RuntimeError("broken")
        finally:
            await send({"type": "raylm.usage", "prompt_tokens": 100, "completion_tokens": 1})

    guard = behind(app, keys=KEYS, clock=Clock())
    with pytest.raises(RuntimeError, match="broken"):
        run(ask(guard, key="b0b"))
    assert run(ask(guard, key="b0b")).status == 429


# Sizes


@pytest.mark.parametrize("size", [2**20, 2**20 + 1])
def test_a_body_over_the_limit_is_413_by_its_announced_length(run: Run, size: int) -> None:
    app = behind(echo, max_request_mib=1)
    answer = run(ask(app, body=[b"x" * size], length=size))
    assert answer.status == (413 if size > 2**20 else 200)
    if size > 2**20:
        assert answer.error["code"] == "request_too_large"
        assert "1 MiB" in answer.error["message"]
        assert len(answer.messages) == 2


@pytest.mark.parametrize("extra", [{}, {"transfer_encoding": "chunked", "length": 10}])
def test_a_body_without_announced_length_is_counted(run: Run, extra: dict[str, Any]) -> None:
    """An app that makes an answer of its own of the broken body is not heard."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await echo(scope, receive, send)
        except ConnectionError:
            await respond(send, b"There was an error parsing the body", status=400)

    guard = behind(app, max_request_mib=1)
    half = b"x" * 2**19
    assert run(ask(guard, body=[half, half], **extra)).body == half * 2
    answer = run(ask(guard, body=[half, half, b"x", half], **extra))
    assert (answer.status, answer.error["code"]) == (413, "request_too_large")
    assert [message["type"] for message in answer.messages] == ["http.response.start", "http.response.body"]
    assert run(ask(behind(app, max_request_mib=1, max_concurrent=1), body=[half, half, b"x"])).status == 413


# The queue


class Slow:
    """An app whose requests end when they are told to."""

    def __init__(self) -> None:
        self.running = self.most = 0
        self.order: list[str] = []
        self.go_on = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        self.order.append(dict(scope["headers"])[b"x-request-id"].decode())
        try:
            body = await read_body(receive)
            await self.go_on.wait()
            await respond(send, body)
        finally:
            self.running -= 1


async def settled() -> None:
    """Until every task waits for something that only the test can bring."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_more_than_the_queue_holds_is_429_at_once(run: Run) -> None:
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


def test_listing_is_not_held_by_a_full_server(run: Run) -> None:
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
def test_who_goes_while_waiting_frees_the_place(run: Run, how: str) -> None:
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


def test_a_client_that_goes_after_waiting_is_noticed_by_the_app(run: Run) -> None:
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


# Time


@pytest.mark.parametrize("waiting", [False, True])
def test_a_late_request_is_504_and_its_work_cancelled(run: Run, waiting: bool) -> None:
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
def test_a_late_stream_ends_with_an_error_event(run: Run, kind: bytes) -> None:
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
def test_what_a_late_request_leaves_behind_hears_of_the_end(run: Run, waiting: bool) -> None:
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


def test_an_app_that_ignores_being_cancelled_is_late_all_the_same(run: Run) -> None:
    async def app(_scope: Any, _receive: Any, _send: Any) -> None:
        with pytest.raises(asyncio.CancelledError):
            await asyncio.sleep(60)

    assert run(ask(behind(app, request_timeout_s=0.1))).status == 504


def test_a_timeout_of_the_apps_own_stays_its_own(run: Run) -> None:
    async def app(_scope: Any, _receive: Any, _send: Any) -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        run(ask(behind(app, request_timeout_s=10)))


# Request ids and the access log


@pytest.mark.parametrize(
    ("sent", "kept"),
    [("abc-123_X.y:z", True), ("a" * 128, True), ("a" * 129, False), ("a b", False), ("a\nb", False), ("ü", False)],
)
def test_a_sane_request_id_is_kept_and_returned(run: Run, sent: str, kept: bool) -> None:
    seen = []

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        seen.extend(value.decode() for name, value in scope["headers"] if name == b"x-request-id")
        await respond(send, b"")

    returned = run(ask(behind(app), x_request_id=sent)).headers["x-request-id"]
    assert seen == [returned]
    assert (returned == sent) is kept
    assert returned.isascii()
    assert len({run(ask(behind(app))).headers["x-request-id"] for _ in range(3)}) == 3
    inside_serve = guarded(app, GuardSettings(access_log=False), echo_request_id=False)
    assert "x-request-id" not in run(ask(inside_serve, x_request_id="abc")).headers


@pytest.fixture
def log_file(tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / "access.log"
    access_log.write_to(file)
    yield file
    access_log.stop_writing()
    logging.getLogger("raylm.access").propagate = True


def lines(file: Path) -> list[dict[str, Any]]:
    for handler in logging.getLogger("raylm.access").handlers:
        handler.flush()
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_each_request_leaves_one_line_without_its_prompt(run: Run, log_file: Path) -> None:
    clock = Clock()

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        await read_body(receive)
        clock.now += 1.5
        await respond(send, b"", b"hello", b" world")
        clock.now += 0.25
        await send({"type": "raylm.usage", "prompt_tokens": 7, "completion_tokens": 9})

    guard = behind(app, clock=clock, keys=KEYS, log=True)
    run(ask(guard, "/llm/v1/x\n", root_path="/llm", key="al1ce", body=[b"sentinel"], length=8, x_request_id="r1"))
    run(ask(guard, key="sentinel"))
    run(ask(guard, "/health", method="GET", length=0))
    ok, unknown = lines(log_file)  # none for a health check that finds nothing
    assert ok.pop("time").endswith("Z")
    assert ok == {
        "request_id": "r1",
        "key": "alice",
        "method": "POST",
        "path": "/v1/x\n",
        "status": 200,
        "outcome": "complete",
        "queued_s": None,
        "first_byte_s": 1.5,
        "seconds": 1.75,
        "prompt_tokens": 7,
        "completion_tokens": 9,
        "request_bytes": 8,
        "response_bytes": 11,
    }
    assert (unknown["key"], unknown["status"]) == (None, 401)
    assert "sentinel" not in log_file.read_text()
    assert log_file.stat().st_mode & 0o077 == 0


def test_prompts_are_logged_when_asked_for(run: Run, log_file: Path) -> None:
    run(ask(behind(echo, log=True, prompts=True), body=[b'{"prompt": ', b'"hi"}'], length=16))
    [line] = lines(log_file)
    assert json.loads(line["request"]) == {"prompt": "hi"}
    assert line["request_bytes"] == 16


def test_the_log_says_how_a_request_ended(run: Run, log_file: Path) -> None:
    async def app(scope: Any, _receive: Any, send: Any) -> None:
        await {"/fails": fails, "/hangs": hangs, "/breaks": breaks}[scope["path"]](send)

    async def fails(_send: Any) -> None:
        raise RuntimeError("broken")

    async def hangs(_send: Any) -> None:
        await asyncio.sleep(60)

    async def breaks(send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})

    async def test() -> None:
        guard = behind(app, log=True, request_timeout_s=0.3)
        with pytest.raises(RuntimeError):
            await ask(guard, "/fails")
        await ask(guard, "/hangs")
        await ask(guard, "/breaks")
        cancelled = asyncio.create_task(ask(guard, "/hangs"))
        await settled()
        cancelled.cancel()
        await asyncio.wait([cancelled])

    run(test())
    assert [(line["path"], line["status"], line["outcome"]) for line in lines(log_file)] == [
        ("/fails", 500, "error"),
        ("/hangs", 504, "timeout"),
        ("/breaks", 200, "disconnect"),
        ("/hangs", 499, "disconnect"),
    ]


def test_a_server_that_raises_instead_of_telling_has_lost_its_client(run: Run, log_file: Path) -> None:
    """As Serve's Python proxy does at times, with Ray's TaskCancelledError."""

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        await read_body(receive)
        while (await receive())["type"] != "http.disconnect":
            pass

    async def test() -> None:
        messages = [{"type": "http.request", "body": b"{}", "more_body": False}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            raise RuntimeError("the task was cancelled")

        scope = {"type": "http", "path": "/leaves", "method": "POST", "headers": [(b"content-length", b"2")]}
        await behind(app, log=True)(scope, receive, lambda _: None)

    run(test())
    [line] = lines(log_file)
    assert (line["status"], line["outcome"]) == (499, "disconnect")


# Together


def test_an_ordinary_client_sees_ordinary_http(run: Run) -> None:
    async def test() -> None:
        guard = behind(echo, keys=KEYS, max_concurrent=2, requests_per_minute=100, request_timeout_s=10)
        transport = httpx.ASGITransport(app=guard)
        headers = {"authorization": "Bearer al1ce"}
        async with httpx.AsyncClient(transport=transport, base_url="http://t", headers=headers) as client:
            answers = await asyncio.gather(*(client.post("/v1/x", content=f"n{n}") for n in range(4)))
        assert [answer.text for answer in answers] == ["n0", "n1", "n2", "n3"]
        assert answers[-1].headers["x-ratelimit-remaining-requests"] == "96"

    run(test())


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_queue": 4}, "max_queue has no meaning without max_concurrent"),
        ({"max_concurrent": 0}, "limits.max_concurrent=0"),
        ({"max_request_mb": 1}, "Did you mean limits.max_request_mib"),
        ({"request_timeout_s": 0}, "limits.request_timeout_s=0"),
    ],
)
def test_limits_without_meaning_are_refused(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(ServeArgs, {"model": "m", "limits": limits})


def test_the_queue_is_as_long_as_what_runs_unless_told_otherwise() -> None:
    assert LimitsSection().queue_places == 0
    assert LimitsSection(max_concurrent=3).queue_places == 3
    assert LimitsSection(max_concurrent=3, max_queue=0).queue_places == 0
