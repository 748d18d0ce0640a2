"""Request ids, and the line that each request leaves in the access log."""

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raylm.serving import access_log
from raylm.serving.guard import GuardSettings, guarded
from tests.serving.guard_support import KEYS, Clock, ask, behind, echo, read_body, respond, run, settled


@pytest.mark.parametrize(
    ("sent", "kept"),
    [("abc-123_X.y:z", True), ("a" * 128, True), ("a" * 129, False), ("a b", False), ("a\nb", False), ("ü", False)],
)
def test_a_sane_request_id_is_kept_and_returned(sent: str, kept: bool) -> None:
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


def test_each_request_leaves_one_line_without_its_prompt(log_file: Path) -> None:
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


def test_a_rotated_log_is_its_owners_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_log, "MAX_FILE_BYTES", 100)
    access_log.write_to(tmp_path / "access.log")
    for _ in range(4):
        access_log.write_line({"path": "/v1/completions" * 4})
    access_log.stop_writing()
    files = sorted(tmp_path.iterdir())
    assert len(files) > 2
    assert [file.stat().st_mode & 0o777 for file in files] == [0o600] * len(files)


def test_prompts_are_logged_when_asked_for(log_file: Path) -> None:
    run(ask(behind(echo, log=True, prompts=True), body=[b'{"prompt": ', b'"hi"}'], length=16))
    [line] = lines(log_file)
    assert json.loads(line["request"]) == {"prompt": "hi"}
    assert line["request_bytes"] == 16


def test_the_log_says_how_a_request_ended(log_file: Path) -> None:
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


def test_a_server_that_raises_instead_of_telling_has_lost_its_client(log_file: Path) -> None:
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
