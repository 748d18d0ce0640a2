"""Clients that go away or read slowly take nothing from the others (known fault W06)."""

import asyncio
import random
import socket
import time
from urllib.parse import urlsplit

import httpx
import pytest

from tests.serving.request_table import completion
from tests.serving.servers import KEY, Running

LONG = completion(max_tokens=200, allowed_token_ids=list(range(30, 90)), stream=True).body
SHORT = completion(max_tokens=4).body
HEADERS = {"authorization": f"Bearer {KEY}"}


def busy(server: Running) -> float:
    """Requests that the engine runs or holds in its queue."""
    figures = server.metrics()
    return figures["vllm:num_requests_running"] + figures["vllm:num_requests_waiting"]


def wait_until_idle(server: Running, seconds: float = 20.0) -> None:
    """The engine counts its requests when it takes a step, so a short one makes it look."""
    deadline = time.monotonic() + seconds
    while True:
        assert server.get("/v1/completions", "POST", json=SHORT).status_code == 200
        if busy(server) == 0:
            return
        assert time.monotonic() < deadline, server.get("/metrics").text
        time.sleep(0.2)


async def go_away(url: str, count: int, seed: int) -> int:
    """Sends `count` streams and drops each at a random time: before the answer, or in the middle of it."""
    generator = random.Random(seed)
    delays = [generator.uniform(0, 1.5) for _ in range(count)]
    gone = 0

    async def ask(client: httpx.AsyncClient, delay: float, prompt: int) -> None:
        nonlocal gone
        body = {**LONG, "prompt": [40 + prompt % 50] * 8}
        try:
            async with asyncio.timeout(delay), client.stream("POST", f"{url}/v1/completions", json=body) as response:
                async for _ in response.aiter_raw():
                    pass
        except TimeoutError:
            gone += 1

    limits = httpx.Limits(max_connections=count)
    async with httpx.AsyncClient(headers=HEADERS, limits=limits, timeout=60, trust_env=False) as client:
        await asyncio.gather(*(ask(client, delay, number) for number, delay in enumerate(delays)))
    return gone


@pytest.mark.parametrize("count", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_clients_that_go_away_leave_nothing_running(server: Running, count: int) -> None:
    before = server.metrics()
    gone = asyncio.run(go_away(server.url, count, seed=count))
    assert gone > count // 4
    wait_until_idle(server)
    after = server.metrics()
    # The engine was told: far fewer tokens than were asked for.
    made = after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"]
    assert made < 200 * (count - gone / 4)
    tokens = after["vllm:generation_tokens_total"]
    time.sleep(0.5)
    assert server.metrics()["vllm:generation_tokens_total"] == tokens
    assert server.get("/v1/completions", "POST", json=SHORT).status_code == 200


def test_a_client_that_reads_slowly_stalls_nobody(server: Running) -> None:
    """One byte a second from a long answer, with a small receive buffer; meanwhile others are answered."""
    parts = urlsplit(server.url)
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        slow.connect((parts.hostname, parts.port))
        body = httpx.Request("POST", server.url, json={**LONG, "logprobs": 5, "n": 8, "temperature": 0.9}).content
        slow.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        assert slow.recv(1) == b"H"
        for _ in range(4):
            assert len(slow.recv(1)) == 1
            for _ in range(3):  # the slow one would take hours to the end of its answer
                assert server.get("/v1/completions", "POST", json=SHORT).status_code == 200
            time.sleep(1)
    wait_until_idle(server)
