"""Where the key comes from, and which requests pass without it (known fault Z06)."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from raylm.errors import ServingError
from raylm.serving.api_key import RequireKey, digest, read_api_key


def test_the_key_is_the_first_line_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("s3cret \nmore\n")
    assert read_api_key(str(file)) == "s3cret"


def test_without_a_file_the_key_is_that_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert read_api_key(None) is None
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    assert read_api_key(None) == "s3cret"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="absent: cannot be read: No such file or directory"):
        read_api_key(str(tmp_path / "absent"))


@pytest.mark.parametrize("text", ["", "\n", "   \nkey\n"])
def test_an_empty_first_line_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "key"
    file.write_text(text)
    with pytest.raises(ServingError, match="has no key in its first line"):
        read_api_key(str(file))


def status_of(path: str, *, authorization: str = "", method: str = "GET", root_path: str = "", **headers: str) -> int:
    """The status a request gets from an app that answers 200 to everything, behind the check for the key `s3cret`."""
    sent: list[Any] = []

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Any:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        sent.append(message)

    all_headers = {"authorization": authorization, **headers} if authorization else headers
    scope = {
        "type": "http",
        "path": path,
        "root_path": root_path,
        "method": method,
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in all_headers.items()],
    }
    asyncio.run(RequireKey(app, digest("s3cret"))(scope, receive, send))
    return int(sent[0]["status"])


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/tokenize", "/docs", "/ping", "/health/", "/v1/../health"])
def test_every_route_but_health_needs_the_key(path: str) -> None:
    assert status_of(path) == 401
    assert status_of(path, authorization="Bearer wrong") == 401
    assert status_of(path, authorization="Basic s3cret") == 401
    assert status_of(path, authorization="Bearer s3cret") == 200


def test_health_is_open_also_below_a_route_prefix() -> None:
    assert status_of("/health") == 200
    assert status_of("/llm/health", root_path="/llm") == 200


def test_only_a_cors_preflight_passes_without_key() -> None:
    assert status_of("/v1/models", method="OPTIONS", access_control_request_method="POST") == 200
    assert status_of("/v1/models", method="OPTIONS") == 401
    assert status_of("/v1/models", method="GET", access_control_request_method="POST") == 401


def test_the_digest_does_not_hold_the_key() -> None:
    assert b"s3cret" not in digest("s3cret")
