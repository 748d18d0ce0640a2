"""What the guard before the routes costs: processor time of one request around an app that does nothing.

The kinds are measured in turn, and the least of all rounds counts: on a busy machine the others are disturbed. Prints a
table, and JSON last.

    python benchmarks/guard_cost.py
"""

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from raylm.config.limits import LimitsSection
from raylm.serving import access_log
from raylm.serving.api_key import ApiKey, digest
from raylm.serving.guard import GuardSettings, guarded

KEY = ApiKey("one", digest("s3cret"))
HUNDRED = (*(ApiKey(str(number), digest(str(number))) for number in range(99)), KEY)
PLENTY = LimitsSection(max_concurrent=64, request_timeout_s=60, requests_per_minute=10**9, tokens_per_minute=10**9)
KINDS: dict[str, GuardSettings | None] = {
    "no guard": None,
    "one key, no access log": GuardSettings((KEY,), access_log=False),
    "one key, access log (as shipped)": GuardSettings((KEY,)),
    "100 keys, access log": GuardSettings(HUNDRED),
    "one key, access log, all limits": GuardSettings((KEY,), PLENTY),
}
SCOPE = {
    "type": "http",
    "path": "/v1/chat/completions",
    "root_path": "",
    "method": "POST",
    "headers": [
        (b"host", b"127.0.0.1:8000"),
        (b"accept", b"application/json"),
        (b"content-type", b"application/json"),
        (b"user-agent", b"OpenAI/Python"),
        (b"authorization", b"Bearer s3cret"),
        (b"content-length", b"2"),
        (b"x-request-id", b"0f8fad5b-d9cb-469f-a165-70867728950e"),
    ],
}


def app_of(chunks: int) -> Any:
    """An app that reads the body and streams so many chunks."""

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for _ in range(chunks - 1):
            await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    return app


async def microseconds(app: Any, requests: int) -> float:
    """Of one request, on average."""

    async def send(_message: Any) -> None:
        pass

    def client() -> Any:
        messages = [{"type": "http.request", "body": b"{}", "more_body": False}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            return await asyncio.get_running_loop().create_future()

        return receive

    started = time.process_time()
    for _ in range(requests):
        await app(SCOPE, client(), send)
    return (time.process_time() - started) / requests * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    table: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        access_log.write_to(Path(folder) / "access.log")
        for chunks, requests in ((1, 4000), (101, 400)):
            best = dict.fromkeys(KINDS, float("inf"))
            for _ in range(options.rounds):
                for kind, settings in KINDS.items():
                    app = app_of(chunks)
                    app = guarded(app, settings, echo_request_id=False) if settings else app
                    best[kind] = min(best[kind], asyncio.run(microseconds(app, requests)))
            for kind, value in best.items():
                table.setdefault(kind, {})[f"{chunks}_chunks_us"] = round(value - best["no guard"], 1)
        access_log.stop_writing()
    print(f"{'microseconds a request':36}{'1 chunk':>10}{'101 chunks':>12}")
    for kind, row in table.items():
        print(f"{kind:36}{row['1_chunks_us']:10.1f}{row['101_chunks_us']:12.1f}")
    print(json.dumps(table))


if __name__ == "__main__":
    main()
