"""What stands before the routes, around small apps without an engine: keys, sizes, all together."""

import asyncio
import pickle
from pathlib import Path
from typing import Any

import httpx
import pytest

from raylm.config.limits import LimitsSection
from raylm.config.load import load_config
from raylm.config.serving import ServeArgs
from raylm.errors import ConfigError
from raylm.serving.api_key import ApiKey, digest
from raylm.serving.guard import GuardSettings, guard_settings
from tests.serving.guard_support import KEYS, ask, behind, echo, respond, run


@pytest.mark.parametrize(
    "path", ["/v1/models", "/metrics", "/tokenize", "/docs", "/ping", "/health/", "/v1/../health", "/x/ready"]
)
def test_every_route_but_health_needs_a_key(path: str) -> None:
    """Known fault Z06."""
    app = behind(echo, keys=KEYS)
    for wrong in ({}, {"key": "wrong"}, {"authorization": "Basic al1ce"}, {"authorization": "al1ce"}):
        answer = run(ask(app, path, method="GET", **wrong))
        assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert answer.error["code"] == 401
    for key in ("al1ce", "b0b"):
        assert run(ask(app, path, method="GET", key=key)).status == 200


def test_health_and_ready_are_open_also_below_a_route_prefix() -> None:
    app = behind(echo, keys=KEYS)
    for path, root in (("/health", ""), ("/ready", ""), ("/llm/health", "/llm"), ("/llm/ready", "/llm")):
        answer = run(ask(app, path, method="GET", root_path=root))
        assert (answer.status, answer.headers["x-path"]) == (200, f"{root}/health")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_health_is_open_for_reading_only(method: str) -> None:
    app = behind(echo, keys=KEYS)
    for path in ("/health", "/ready"):
        assert run(ask(app, path, method=method)).status == 401
        assert run(ask(app, path, method="HEAD")).status == 200


def test_only_a_cors_preflight_passes_without_key() -> None:
    app = behind(echo, keys=KEYS)
    asked = {"access_control_request_method": "POST", "origin": "https://page.example"}
    assert run(ask(app, method="OPTIONS", **asked)).status == 200
    for name in asked:  # half of one is answered by a route
        assert run(ask(app, "/metrics", method="OPTIONS", **{name: asked[name]})).status == 401
    assert run(ask(app, method="OPTIONS")).status == 401
    assert run(ask(app, method="GET", **asked)).status == 401


def of_websockets(keys: Any, *authorizations: bytes, **limits: Any) -> list[str]:
    """What websockets with these headers are told, one after the other."""
    sent: list[str] = []

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    guard = behind(app, keys=keys, **limits)
    for value in authorizations:
        run(guard({"type": "websocket", "path": "/v1/realtime", "headers": [(b"authorization", value)]}, receive, send))
    return sent


def test_a_websocket_needs_a_key() -> None:
    assert of_websockets(KEYS, b"Bearer wrong", b"Bearer al1ce") == ["websocket.close", "websocket.accept"]


@pytest.mark.parametrize("keys", [(), KEYS])
def test_a_websocket_counts_as_a_request(keys: Any) -> None:
    sent = of_websockets(keys, *[b"Bearer al1ce"] * 3, requests_per_minute=2)
    assert sent == ["websocket.accept", "websocket.accept", "websocket.close"]


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


@pytest.mark.parametrize("size", [2**20, 2**20 + 1])
def test_a_body_over_the_limit_is_413_by_its_announced_length(size: int) -> None:
    app = behind(echo, max_request_mib=1)
    answer = run(ask(app, body=[b"x" * size], length=size))
    assert answer.status == (413 if size > 2**20 else 200)
    if size > 2**20:
        assert answer.error["code"] == "request_too_large"
        assert "1 MiB" in answer.error["message"]
        assert len(answer.messages) == 2


@pytest.mark.parametrize("extra", [{}, {"transfer_encoding": "chunked", "length": 10}])
def test_a_body_without_announced_length_is_counted(extra: dict[str, Any]) -> None:
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


def test_an_ordinary_client_sees_ordinary_http() -> None:
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
