"""vLLM's own routes behind the guard, in this process and without an engine: vLLM has an app that only renders prompts.

tests/serving/test_door.py asks a server with an engine.
"""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest

from raylm.config.limits import LimitsSection
from raylm.config.serving import ServeArgs
from raylm.serving.api_key import ApiKey, digest
from raylm.serving.guard import GuardSettings, guarded

KEYS = (ApiKey("main", digest("s3cret")),)
MESSAGES = [{"role": "user", "content": "hello"}]
WithClient = Callable[[httpx.AsyncClient], Coroutine[Any, Any, None]]


def vllm_app(
    model: Path, *, tasks: tuple[str, ...] = ("render",), model_config: Any = None, **engine: Any
) -> tuple[Any, Any]:
    """vLLM's app as our replica builds it, and its arguments."""
    from vllm.entrypoints.launchers.app import build_app

    from raylm.serving.replica import _parse

    namespace = _parse(ServeArgs(model=str(model), name="tiny", engine=engine), str(model))
    return build_app(namespace, tasks, model_config), namespace


def ask_renderer(model: Path, test: WithClient, *, limits: LimitsSection | None = None, **engine: Any) -> None:
    """Runs the test with a client of vLLM's rendering app behind the guard."""
    from vllm import AsyncEngineArgs
    from vllm.config import VllmConfig
    from vllm.entrypoints.launchers.render.app_state import init_render_app_state

    async def run() -> None:
        app, namespace = vllm_app(model, **engine)
        config = VllmConfig(model_config=AsyncEngineArgs.from_cli_args(namespace).create_model_config())
        await init_render_app_state(config, app.state, namespace)
        settings = GuardSettings(KEYS, limits or LimitsSection(), access_log=False)
        app.middleware_stack = guarded(app.middleware_stack or app.build_middleware_stack(), settings)
        headers = {"authorization": "Bearer s3cret"}
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://t", headers=headers) as client:
            await test(client)

    asyncio.run(run())


def test_no_client_changes_the_engines_processes(served_model_dir: Path) -> None:
    from raylm.serving.replica import close_operators_routes

    app, _ = vllm_app(served_model_dir, tasks=("generate",))
    before = {route.path for route in app.routes}
    close_operators_routes(app)
    assert before - {route.path for route in app.routes} == {"/scale_elastic_ep", "/is_scaling_elastic_ep"}


@pytest.mark.parametrize(
    ("tasks", "cannot", "can"),
    [
        (("generate",), ("/v1/embeddings", "/v2/embed", "/rerank", "/v1/systemone"), "/v1/chat/completions"),
        (("embed",), ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/systemone"), "/v1/embeddings"),
    ],
)
def test_what_a_model_cannot_is_a_404_that_says_what_it_can(
    served_model_dir: Path, tasks: tuple[str, ...], cannot: tuple[str, ...], can: str
) -> None:
    from vllm import AsyncEngineArgs

    from raylm.serving.unserved import refuse_what_the_model_cannot

    runner = "pooling" if tasks == ("embed",) else "generate"
    model_config = AsyncEngineArgs(model=str(served_model_dir), runner=runner).create_model_config()
    app, _ = vllm_app(served_model_dir, tasks=tasks, model_config=model_config)
    before = {route.path for route in app.routes}
    refuse_what_the_model_cannot(app, "tiny")
    assert {route.path for route in app.routes if getattr(route, "include_in_schema", False)} < before
    assert "/v1/systemone" not in app.openapi()["paths"]

    async def test() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://t") as client:
            for path in cannot:
                answer = await client.post(path, json={"model": "tiny", "input": "x"})
                error = answer.json()["error"]
                assert (answer.status_code, error["type"], error["code"]) == (404, "NotFoundError", 404)
                assert f"The model `tiny` does not serve {path}. It serves " in error["message"]
                assert can in error["message"]
            assert (await client.post("/v1/nothing")).json() == {"detail": "Not Found"}

    asyncio.run(test())


def test_every_route_of_vllm_but_health_needs_a_key(served_model_dir: Path) -> None:
    """Known fault Z06: the routes of the app itself, those too that its description leaves out."""
    app, _ = vllm_app(served_model_dir, tasks=("generate",))
    found = [(route.path, method) for route in app.routes for method in getattr(route, "methods", None) or ["GET"]]
    assert {"/metrics", "/docs", "/openapi.json", "/v1/models", "/tokenize", "/ping", "/load"} <= {p for p, _ in found}
    assert len(found) > 30
    stack = guarded(app.middleware_stack or app.build_middleware_stack(), GuardSettings(KEYS, access_log=False))

    async def test() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=stack), base_url="http://t") as client:
            for path, method in [*found, ("/nothing", "GET"), ("/", "GET"), ("/health/", "GET")]:
                if path != "/health":
                    for headers in ({}, {"authorization": "Bearer wrong"}):
                        answer = await client.request(method, path, headers=headers)
                        assert answer.status_code == 401, (method, path)

    asyncio.run(test())


def test_health_and_ready_ask_vllm(served_model_dir: Path) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        del client.headers["authorization"]
        for path in ("/health", "/ready"):
            assert (await client.get(path)).status_code == 200

    ask_renderer(served_model_dir, test)


@pytest.mark.parametrize("trusted", [False, True])
def test_templates_of_requests_are_refused_unless_trusted(served_model_dir: Path, trusted: bool) -> None:
    """A template is a program."""

    async def test(client: httpx.AsyncClient) -> None:
        body = {"model": "tiny", "messages": MESSAGES}
        for route in ("/tokenize", "/v1/chat/completions/render"):
            assert (await client.post(route, json=body)).status_code == 200
            for own in ({"chat_template": "{{ 1 }}"}, {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}):
                answer = await client.post(route, json={**body, **own})
                if trusted:
                    assert "chat template is passed with request" not in answer.text.lower()
                else:
                    assert (answer.status_code, answer.json()["error"]["code"]) == (400, 400)
                    assert "untrusted chat template" in answer.json()["error"]["message"]

    ask_renderer(served_model_dir, test, **({"trust_request_chat_template": True} if trusted else {}))


@pytest.mark.parametrize("origins", [None, ["http://page.example"], "http://page.example"])
def test_pages_of_other_origins_are_let_in_by_name(served_model_dir: Path, origins: Any) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        for origin in ("http://page.example", "http://other.example"):
            allowed = origin if origins and origin == "http://page.example" else None
            answer = await client.get("/version", headers={"origin": origin})
            assert answer.status_code == 200
            assert answer.headers.get("access-control-allow-origin") == allowed
            asked = {"origin": origin, "access-control-request-method": "POST", "authorization": ""}
            answer = await client.options("/tokenize", headers=asked)
            assert answer.status_code == (200 if allowed else 400)
            assert answer.headers.get("access-control-allow-origin") == allowed

    ask_renderer(served_model_dir, test, **({"allowed_origins": origins} if origins else {}))


def test_what_fastapi_makes_of_a_body_that_is_cut_off_is_not_heard(served_model_dir: Path) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        async def chunks() -> Any:
            for _ in range(3):
                yield b" " * 2**19

        answer = await client.post("/tokenize", content=chunks(), headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
        answer = await client.post("/tokenize", json={"model": "tiny", "prompt": "hello" * 300_000})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
        answer = await client.post("/tokenize", json={"model": "tiny", "prompt": "hello"})
        assert answer.status_code == 200

    ask_renderer(served_model_dir, test, limits=LimitsSection(max_request_mib=1))
