"""What stands before the routes, at a server with an engine: test_guard*.py have the rest.

The server is shared and asks for the keys of door_support.py.
"""

import json
import socket
import time
from typing import Any

import httpx
import pytest
from openai import RateLimitError

from tests.serving.door_support import LIMITED_KEY, becomes_idle, logged
from tests.serving.servers import KEY, Running

ALL = list(range(3, 259))
MESSAGES: list[Any] = [{"role": "user", "content": "hello, who are you? ✓ 你好"}]


def test_only_health_is_open_without_the_key(server: Running) -> None:
    """Known fault Z06: every route that the app describes; test_guarded_routes.py has the others."""
    assert server.get("/health", key=None).status_code == 200
    assert server.get("/ready", key=None).status_code == 200
    paths: dict[str, dict[str, Any]] = server.get("/openapi.json").json()["paths"]
    routes = [(path, method.upper()) for path, methods in paths.items() for method in methods if path != "/health"]
    assert len(routes) > 10
    others = [("/metrics", "GET"), ("/docs", "GET"), ("/openapi.json", "GET"), ("/nothing", "GET")]
    for path, method in routes + others:
        assert server.get(path, method, key=None).status_code == 401, (method, path)
        assert server.get(path, method, key="wrong").status_code == 401, (method, path)
    assert server.get("/metrics").status_code == 200


COUNTED: list[tuple[str, dict[str, Any]]] = [
    ("chat/completions", {"messages": MESSAGES, "max_tokens": 9}),
    ("chat/completions", {"messages": MESSAGES, "max_tokens": 9, "n": 3, "temperature": 1}),
    ("chat/completions", {"messages": MESSAGES, "max_tokens": 7, "stream": True}),
    ("chat/completions", {"messages": MESSAGES, "max_tokens": 7, "stream": True, "n": 2, "temperature": 1}),
    ("completions", {"prompt": ["hello", "who are you?", "a b c"], "max_tokens": 5, "ignore_eos": True}),
    ("completions", {"prompt": "hello", "max_tokens": 5, "n": 2, "temperature": 1, "echo": True}),
    ("completions", {"prompt": ["hello", "a"], "max_tokens": 40, "stop": ["e", "a", "i"], "allowed_token_ids": ALL}),
    ("completions", {"prompt": "hello", "max_tokens": 40, "stream": True, "stop": "e", "allowed_token_ids": ALL}),
    ("completions", {"prompt": [1] * 200, "max_tokens": 20, "stream": True, "ignore_eos": True}),
    ("responses", {"input": "hello", "max_output_tokens": 6}),
]


@pytest.mark.parametrize("number", range(len(COUNTED)))
def test_tokens_are_counted_as_vllm_reports_them(server: Running, number: int) -> None:
    route, body = COUNTED[number]
    streamed = {"stream_options": {"include_usage": True}} if body.get("stream") else {}
    request_id = f"counted-{number}"
    answer = server.get(
        f"/v1/{route}", "POST", json={"model": "tiny-llama", **body, **streamed}, headers={"x-request-id": request_id}
    )
    assert answer.status_code == 200, answer.text
    assert answer.headers.get_list("x-request-id") == [request_id]
    if streamed:
        *_, last, _done = (line for line in answer.text.splitlines() if line)
        usage = json.loads(last.removeprefix("data: "))["usage"]
    else:
        usage = answer.json()["usage"]
    names = ("input_tokens", "output_tokens") if route == "responses" else ("prompt_tokens", "completion_tokens")
    reported = [usage[name] for name in names]
    line = logged(server, request_id)
    assert [line["prompt_tokens"], line["completion_tokens"]] == reported
    assert min(reported) > 0
    assert (line["key"], line["status"], line["outcome"]) == ("main", 200, "complete")
    assert line["path"] == f"/v1/{route}"
    assert line["response_bytes"] == len(answer.content)
    assert 0 < line["first_byte_s"] <= line["seconds"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_ends_its_request_in_the_engine(server: Running, tokenizer: Any, stream: bool) -> None:
    """Known fault W06. What was generated until then is booked."""
    body = {"model": "tiny-llama", "prompt": "hello", "max_tokens": 250, "ignore_eos": True, "stream": stream}
    body |= {"n": 100, "temperature": 1, "logprobs": 5}
    request_id = f"hangs-up-{stream}"
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: t\r\nAuthorization: Bearer {KEY}\r\nX-Request-Id: {request_id}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port)) as connection:
        connection.sendall(head.encode() + content)
        if stream:
            begun = b""
            while b"data:" not in begun:  # asking /metrics whether it has would wait behind its answers
                begun += connection.recv(4096)
        else:
            time.sleep(0.5)  # of the seconds that 100 answers take
    with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {KEY}"}, trust_env=False) as client:
        assert becomes_idle(client, "tiny-llama")
    line = logged(server, request_id)
    assert line["outcome"] == "disconnect"
    assert line["prompt_tokens"] == len(tokenizer("hello")["input_ids"])
    assert int(stream) <= line["completion_tokens"] < 100 * 250
    assert server.get("/v1/completions", "POST", json={**body, "n": 1, "max_tokens": 3}).status_code == 200


def test_a_key_has_limits_of_its_own(server: Running) -> None:
    body = {"model": "tiny-llama", "prompt": "hello", "max_tokens": 4}
    answers = [server.get("/v1/completions", "POST", key=LIMITED_KEY, json=body) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[2].json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(answers[2].headers["retry-after"]) <= 30
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
    assert answers[0].headers["x-ratelimit-limit-tokens"] == "60000"
    assert server.get("/v1/models", key=LIMITED_KEY).status_code == 200
    assert server.get("/v1/completions", "POST", json=body).status_code == 200
    with pytest.raises(RateLimitError, match="2 requests per minute"):
        server.client(LIMITED_KEY).completions.create(**body)


def test_a_body_that_is_too_large_is_413(server: Running) -> None:
    answer = server.get("/v1/completions", "POST", content=b"x" * (16 * 2**20 + 1))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    chunks = (b"x" * 2**20 for _ in range(17))
    answer = server.get("/v1/completions", "POST", content=chunks)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


def test_a_request_for_too_many_answers_is_400(server: Running) -> None:
    body = {"model": "tiny-llama", "prompt": "hello", "max_tokens": 1, "temperature": 1}
    answer = server.get("/v1/completions", "POST", json={**body, "n": 129})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")
    assert "n must be at most 128 (limits.max_n of the server), got 129." in answer.json()["error"]["message"]
    answer = server.get("/v1/completions", "POST", json={**body, "prompt": ["hello"] * 2049})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
    assert "limits.max_sequences" in answer.json()["error"]["message"]
