"""The gateway's app without Ray: small apps in place of the engines, and a server that behaves as uvicorn does."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError

from raylm.config.limits import LimitsSection
from raylm.serving.access_log import stop_writing, write_to
from raylm.serving.api_key import ApiKey, digest
from raylm.serving.gateway import GatewayApp, Route
from raylm.serving.guard import GuardSettings, guarded
from raylm.serving.relay import Visits, messages_of
from raylm.serving.usage import Metered, watch
from tests.serving.test_usage import Engine

KEY = ApiKey("alice", digest("al1ce"), tokens_per_minute=1000)


class Handle:
    """As Serve's handle of `EngineReplica`, in this process."""

    def __init__(self, app: Any) -> None:
        self._app, self._visits = app, Visits()

    def options(self, **_: Any) -> "Handle":
        return self

    @property
    def handle(self) -> "Handle":
        return self

    def remote(self, request: Any) -> "Answers":
        return Answers(self._visits.messages(self._app, request))

    def broadcast(self, method: str, argument: Any) -> "Everyone":
        return Everyone({"answer": self._answer, "leave": self._visits.leave}[method](argument))

    async def _answer(self, request: Any) -> tuple[int, bytes]:
        messages = [message async for batch in messages_of(self._app, request) for message in batch]
        return messages[0]["status"], b"".join(message.get("body", b"") for message in messages)


class Everyone:
    """The answers of all replicas, of which one knows nothing."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    async def results_async(self, **_: Any) -> list[Any]:
        await asyncio.sleep(0.05)
        return [await self._answer, *([None] if self._answer.__name__ == "leave" else [])]


class Answers:
    """What a call with `stream=True` gives: after `cancel` nothing more comes."""

    def __init__(self, messages: AsyncIterator[Any]) -> None:
        self._messages = messages
        self.closing: asyncio.Task[None] | None = None

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._messages

    def cancel(self) -> None:
        self.closing = asyncio.ensure_future(self._messages.aclose())  # type: ignore[attr-defined]


def gateway(*engines: tuple[str, Any]) -> GatewayApp:
    handles = [(Route(f"engine-{name}", (name,), False, False), Handle(app)) for name, app in engines]
    return GatewayApp(handles, LimitsSection(max_n=4))


class Visit:
    """One request as uvicorn has it: once the response is complete, `receive` says that the client has gone."""

    def __init__(self, path: str, body: bytes = b"", *, method: str = "POST", key: str = "al1ce") -> None:
        headers = [(b"authorization", f"Bearer {key}".encode()), (b"content-length", str(len(body)).encode())]
        self.scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": headers}
        self.sent: list[Any] = []
        self.reads = 0
        self.over = asyncio.Event()
        self._body = body

    async def receive(self) -> Any:
        self.reads += 1
        if self.reads == 1:
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self.over.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.over.set()

    async def made_of(self, app: Any) -> "Visit":
        await asyncio.wait_for(app(self.scope, self.receive, self.send), 20)
        return self

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    def header(self, name: bytes) -> str:
        return dict(self.sent[0]["headers"])[name].decode()


def named(name: str, *adapters: str) -> Any:
    """An engine that answers with its name, and lists adapters as ours do."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        cards = [{"id": name, "root": "/models/other", "parent": None}]
        cards += [{"id": f"{name}:{adapter}", "root": adapter, "parent": name} for adapter in adapters]
        body = json.dumps({"data": cards} if scope["path"] == "/v1/models" else {"by": name}).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    return app


@pytest.mark.parametrize(("several", "begins", "status"), [(True, False, 200), (False, False, 503), (True, True, None)])
def test_what_a_replica_has_lost_another_is_asked(several: bool, begins: bool, status: int | None) -> None:
    """Unless an answer has begun already, which then breaks off."""
    asked = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            await send({"type": "raylm.usage", "prompt_tokens": 1, "completion_tokens": 0})
            if begins:
                await send({"type": "http.response.start", "status": 200, "headers": []})
            raise RayActorError
        await named("a")(scope, receive, send)

    route = Route("engine-a", ("a",), by_prefix=False, may_sleep=False, several=several)
    visit = Visit("/v1/completions", b'{"model": "a"}')
    call = visit.made_of(GatewayApp([(route, Handle(app))], LimitsSection()))
    if status is None:
        with pytest.raises(RayActorError):
            asyncio.run(call)
        assert asked == 1
    else:
        asyncio.run(call)
        assert [message["status"] for message in visit.sent if "status" in message] == [status]
        assert asked == (2 if several else 1)


@pytest.mark.parametrize(
    ("asked", "engine"),
    [
        ("a", "a"),
        ("a:polite", "a"),
        ("org/m:1.5", "org/m:1.5"),
        ("org/m:1.5:rude", "org/m:1.5"),
        ("org/m:x", "org/m"),
        ("rude", "org/m:1.5"),
        ("polite", "a"),
        ("/models/other", None),
        ("b", None),
    ],
)
def test_a_name_leads_to_an_engine(asked: str, engine: str | None) -> None:
    app = gateway(("a", named("a", "polite")), ("org/m", named("org/m")), ("org/m:1.5", named("org/m:1.5", "rude")))

    async def steps() -> Visit:
        return await Visit("/v1/completions", json.dumps({"model": asked}).encode()).made_of(app)

    answer = asyncio.run(steps())
    if engine is None:
        assert answer.sent[0]["status"] == 404
        message = json.loads(answer.body)["error"]["message"]
        names = "a, a:polite, org/m, org/m:1.5, org/m:1.5:rude"
        assert message == f"The model `{asked}` does not exist. It is one of {names}."
    else:
        assert json.loads(answer.body) == {"by": engine}


def test_who_asks_for_the_lists_at_once_waits_for_the_same_answer() -> None:
    app = gateway(("a", named("a", "polite")), ("b", named("b", "rude")))

    async def steps() -> list[Visit]:
        bodies = [json.dumps({"model": name}).encode() for name in ("polite", "rude", "c", "polite")]
        return await asyncio.gather(*(Visit("/v1/completions", body).made_of(app) for body in bodies))

    answers = asyncio.run(steps())
    assert [answer.sent[0]["status"] for answer in answers] == [200, 200, 404, 200]
    assert [json.loads(answers[place].body)["by"] for place in (0, 1, 3)] == ["a", "b", "a"]


@pytest.mark.parametrize(("origins", "status"), [([], 400), (["http://page"], 200)])
def test_a_preflight_learns_of_no_model_and_reaches_no_engine(origins: list[str], status: int) -> None:
    async def never(*_: Any) -> None:
        raise AssertionError("an engine was asked")

    cors = {"allow_origins": origins, "allow_methods": ["*"]}
    engines = [(Route(f"engine-{name}", (name,), False, True), Handle(never)) for name in ("secret", "other")]
    app = guarded(GatewayApp(engines, LimitsSection(), cors), GuardSettings((KEY,), access_log=False))

    async def steps() -> Visit:
        visit = Visit("/v1/models", b'{"model": "nobody"}', method="OPTIONS", key="none")
        visit.scope["headers"] += [(b"origin", b"http://page"), (b"access-control-request-method", b"POST")]
        return await visit.made_of(app)

    visit = asyncio.run(steps())
    assert visit.sent[0]["status"] == status
    assert b"secret" not in visit.body
    assert (b"access-control-allow-origin", b"http://page") in visit.sent[0]["headers"] or status == 400


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_body_is_read_as_the_engine_reads_it(encoding: str) -> None:
    """Half a character and other encodings than UTF-8 are JSON for vLLM's routes."""
    app = gateway(("a", named("a")), ("b", named("b")))

    async def ask(n: int) -> Visit:
        text = f'{{"model": "b", "prompt": "\\ud83d", "n": {n}}}'
        return await Visit("/v1/completions", text.encode(encoding)).made_of(app)

    assert json.loads(asyncio.run(ask(1)).body) == {"by": "b"}
    assert asyncio.run(ask(5)).sent[0]["status"] == 400


def test_a_request_for_too_many_answers_reaches_no_engine() -> None:
    app = gateway(("a", named("a")))
    visit = asyncio.run(Visit("/v1/completions", b'{"model": "a", "n": 5}').made_of(app))
    assert visit.sent[0]["status"] == 400
    error = json.loads(visit.body)["error"]
    assert (error["type"], error["param"], error["code"]) == ("BadRequestError", "n", 400)
    assert error["message"] == "n must be at most 4 (limits.max_n of the server), got 5."


def keeping(name: str, *responses: str, fails: int = 0) -> Any:
    """An engine that keeps the responses it has made, as vLLM's does: by id, in its own memory."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        _, _, kind, response, *rest = scope["path"].split("/")
        kept = kind == "responses" and response in responses
        status = fails or (200 if kept else 404)
        body = {"by": name, "did": f"{scope['method']} {' '.join(rest)} {scope['query_string'].decode()}".split()}
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(body if status == 200 else {}).encode()})

    return app


@pytest.mark.parametrize(
    ("method", "path", "query", "by", "did"),
    [
        ("GET", "resp_b", b"", "b", ["GET"]),
        ("GET", "resp_a", b"starting_after=1", "a", ["GET"]),
        ("GET", "resp_b", b"stream=true&starting_after=1", "b", ["GET", "stream=true&starting_after=1"]),
        ("GET", "resp_b", b"stream=false", "b", ["GET"]),
        ("POST", "resp_b/cancel", b"", "b", ["POST", "cancel"]),
    ],
)
def test_a_response_that_was_made_before_is_found_where_it_was_made(
    method: str, path: str, query: bytes, by: str, did: list[str]
) -> None:
    app = gateway(("a", keeping("a", "resp_a")), ("b", keeping("b", "resp_b")))

    async def steps() -> Visit:
        visit = Visit(f"/v1/responses/{path}", method=method)
        visit.scope["query_string"] = query
        return await visit.made_of(app)

    answer = asyncio.run(steps())
    assert (answer.sent[0]["status"], json.loads(answer.body)) == (200, {"by": by, "did": did})


@pytest.mark.parametrize(("method", "path"), [("GET", "resp_x"), ("POST", "resp_x/cancel")])
def test_a_response_that_nobody_keeps_is_404_as_vllm_answers_it(method: str, path: str) -> None:
    app = gateway(("a", keeping("a")), ("b", keeping("b", "resp_b")), ("c", keeping("c", fails=501)))
    answer = asyncio.run(Visit(f"/v1/responses/{path}", method=method).made_of(app))
    error = json.loads(answer.body)["error"]
    assert answer.sent[0]["status"] == error["code"] == 404
    assert (error["type"], error["param"]) == ("invalid_request_error", "response_id")
    assert error["message"] == "Response with id 'resp_x' not found."


def test_a_response_that_an_engine_in_trouble_may_keep_is_503() -> None:
    app = gateway(("a", keeping("a", "resp_a")), ("b", keeping("b", fails=500)))
    visits = [Visit(f"/v1/responses/{response}", method="GET") for response in ("resp_a", "resp_x")]
    assert [asyncio.run(visit.made_of(app)).sent[0]["status"] for visit in visits] == [200, 503]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_no_body_is_held_for_a_route_that_is_open_to_all(method: str) -> None:
    """A client that never stops sending, and has no key."""

    async def steps() -> None:
        visit = Visit("/ready", method=method, key="none")

        async def endless() -> Any:
            await asyncio.sleep(0)
            return {"type": "http.request", "body": b"x" * 2**16, "more_body": True}

        visit.receive = endless  # type: ignore[method-assign]
        app = guarded(gateway(("a", named("a"))), GuardSettings((KEY,), access_log=False))
        await visit.made_of(app)
        assert visit.sent[0]["status"] == 200

    asyncio.run(steps())


@pytest.fixture
def engine(tokenizer: Any) -> Engine:
    engine = Engine(tokenizer)
    watch(engine)
    return engine


async def left_tokens(app: Any) -> int:
    """What the key may still spend, as a further answer says it."""
    visit = await Visit("/v1/completions", b'{"model": "a", "nothing": 1}').made_of(app)
    return int(visit.header(b"x-ratelimit-remaining-tokens"))


def streaming(engine: Engine, *, ends: bool) -> Any:
    """As vLLM streams: prompts of 3 tokens, two pieces of 2 tokens, and at the end one token without text."""

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        nothing = b"nothing" in (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if nothing:
            await send({"type": "http.response.body", "body": b""})
            return
        engine.add("a")
        for _ in range(2):
            engine.generate("a", 2)
            await send({"type": "http.response.body", "body": b"data", "more_body": True})
            await asyncio.sleep(0.01)
        if not ends:
            await asyncio.Event().wait()
        await send({"type": "http.response.body", "body": b""})
        await asyncio.sleep(0.05)  # over a network the rest comes later than the end of the response
        engine.generate("a", 1, last=True)

    return Metered(app, engine, along=True)


def behind_a_door(engine: Engine, *, ends: bool, **limits: Any) -> Any:
    settings = GuardSettings((KEY,), LimitsSection(**limits), access_log=False)
    return guarded(gateway(("a", streaming(engine, ends=ends))), settings, clock=lambda: 0.0)


def test_a_stream_that_ends_is_booked_to_the_last_token(engine: Engine) -> None:
    async def steps() -> int:
        app = behind_a_door(engine, ends=True)
        visit = await Visit("/v1/completions", b'{"model": "a"}').made_of(app)
        assert visit.body == b"datadata"
        assert [message["type"] for message in visit.sent] == ["http.response.start", *["http.response.body"] * 3]
        return await left_tokens(app)

    assert asyncio.run(steps()) == 1000 - 3 - 5


@pytest.mark.parametrize("how", ["left", "late"])
def test_a_stream_that_breaks_off_is_booked_as_far_as_it_came(engine: Engine, how: str) -> None:
    async def steps() -> int:
        app = behind_a_door(engine, ends=False, request_timeout_s=0.3 if how == "late" else 60)
        visit = Visit("/v1/completions", b'{"model": "a"}')
        if how == "left":
            asyncio.get_running_loop().call_later(0.2, visit.over.set)
        await visit.made_of(app)
        return await left_tokens(app)

    assert asyncio.run(steps()) == 1000 - 3 - 4


def whole(engine: Engine) -> Any:
    """As vLLM makes a whole answer: nothing is sent before it is complete, and cancelled it is not sent."""

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        nothing = b"nothing" in (await receive())["body"]
        if not nothing:
            engine.add("a")
            engine.generate("a", 4)
            while (await receive())["type"] != "http.disconnect":
                pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"null"})

    return Metered(app, engine, along=True)


@pytest.mark.parametrize("how", ["left", "late", "cancelled", "cancelled twice"])
def test_a_whole_answer_that_nobody_waits_for_is_booked_as_far_as_it_came(
    engine: Engine, how: str, tmp_path: Path
) -> None:
    write_to(tmp_path / "access.log")
    limits = LimitsSection(request_timeout_s=0.3 if how == "late" else None)
    app = guarded(gateway(("a", whole(engine))), GuardSettings((KEY,), limits), clock=lambda: 0.0)

    async def steps() -> int:
        visit = Visit("/v1/completions", b'{"model": "a"}')
        request = asyncio.create_task(app(visit.scope, visit.receive, visit.send))
        await asyncio.sleep(0.1)
        if how == "left":
            visit.over.set()
        elif how != "late":
            request.cancel()
        if how == "cancelled twice":
            await asyncio.sleep(0.02)
            request.cancel()
        await asyncio.wait([request], timeout=10)
        return await left_tokens(app)

    try:
        assert asyncio.run(steps()) == 1000 - 3 - 4
    finally:
        stop_writing()
    first = json.loads((tmp_path / "access.log").read_text().splitlines()[0])
    expected = (504, "timeout") if how == "late" else (499, "disconnect")
    assert (first["status"], first["outcome"], first["completion_tokens"]) == (*expected, 4)
