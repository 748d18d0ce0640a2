"""Clients that hang up before a whole answer, through Serve and its proxies; a small ASGI app in place of vLLM's."""

import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from raylm.config.load import load_config
from raylm.config.serving import ServeConfig
from raylm.serving.app import _COMMON
from raylm.serving.gateway import Gateway, Route
from raylm.serving.gateway import _live as live
from raylm.serving.guard import GuardSettings, guarded
from raylm.serving.proxy import front_door
from raylm.serving.relay import EngineReplica
from tests.serving.door_support import access_lines, eventually
from tests.serving.servers import free_port

COUNT = 12


def classes() -> tuple[type, type]:
    """An engine for a gateway, and a replica that clients reach directly; local, as workers do not know tests/."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        """Has read a prompt of 3 tokens, makes an answer for ever, and says what it has made when its client goes."""
        if scope["type"] == "lifespan":
            await live(receive, send)
            return
        await receive()
        await send({"type": "raylm.usage", "prompt_tokens": 3, "completion_tokens": 1})
        try:
            while (await receive())["type"] != "http.disconnect":
                pass
        finally:
            await send({"type": "raylm.usage", "prompt_tokens": 0, "completion_tokens": 5})

    class Engine(EngineReplica):
        async def __init__(self) -> None:  # type: ignore[misc]
            self._start(app)

        async def __del__(self) -> None:
            pass

        async def check_health(self) -> None:
            pass

    class Direct:
        async def __serve_build_asgi_app__(self) -> Any:
            from raylm.serving.access_log import write_beside_the_replica_log

            write_beside_the_replica_log()
            return guarded(app, GuardSettings(), echo_request_id=False)

    return Engine, Direct


@pytest.fixture(scope="module", params=["haproxy", pytest.param("python", marks=pytest.mark.slow)])
def port(request: pytest.FixtureRequest, ray_cluster: Any) -> Iterator[int]:
    """Of a Serve with both shapes: the gateway at /, a replica without one at /direct."""
    from ray import serve

    config = load_config(ServeConfig, {"model": "m", "port": free_port(), "proxy": request.param})
    engine, direct = classes()
    options: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0}, "graceful_shutdown_timeout_s": 1, **_COMMON}
    with front_door(config, num_nodes=1):
        bound = serve.deployment(engine, name="engine-m", **options).bind()
        gateway = serve.deployment(serve.ingress()(Gateway), name="gateway", **options)
        routes = [Route("engine-m", ("m",), by_prefix=False, may_sleep=False)]
        serve.run(serve.deployment(serve.ingress()(direct), **options).bind(), name="direct", route_prefix="/direct")
        serve.run(gateway.bind(routes, {"engine-m": bound}, GuardSettings(), {}), name="raylm", route_prefix="/")
        yield config.port
        serve.delete("direct")
        serve.delete("raylm")


@pytest.mark.parametrize("path", ["/v1/completions", "/direct/v1/completions"])
@pytest.mark.parametrize("apart", [True, False])
def test_a_client_that_leaves_before_a_whole_answer_ends_its_request(port: int, path: str, apart: bool) -> None:
    """Known fault W06. apart: head and body in packets of their own, as HTTP libraries send them."""
    body = b'{"model": "m"}'
    ids = {f"{path.split('/')[1]}-{port}-{apart}-{number}" for number in range(COUNT)}
    connections = [socket.create_connection(("127.0.0.1", port)) for _ in ids]
    for connection, request_id in zip(connections, sorted(ids), strict=True):
        head = f"POST {path} HTTP/1.1\r\nHost: t\r\nX-Request-Id: {request_id}\r\nContent-Length: {len(body)}\r\n\r\n"
        if apart:
            connection.sendall(head.encode())
            time.sleep(0.02)
            connection.sendall(body)
        else:
            connection.sendall(head.encode() + body)
    time.sleep(0.5)
    for connection in connections:
        connection.close()

    def ended() -> list[dict[str, Any]]:
        return [line for line in access_lines() if line["request_id"] in ids]

    assert eventually(lambda: len(ended()) == COUNT), f"{COUNT - len(ended())} of {COUNT} go on"
    for line in ended():
        assert (line["status"], line["outcome"]) == (499, "disconnect")
        assert (line["prompt_tokens"], line["completion_tokens"]) == (3, 6)
