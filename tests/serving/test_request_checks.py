"""What vLLM's own routes refuse beyond what they refuse themselves, without an engine."""

import asyncio
from argparse import Namespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from raylm.config.limits import LimitsSection
from raylm.serving.request_checks import answer_without_text, check_requests

LIMITS = LimitsSection(max_n=4, max_sequences=10)
TEXT = {"type": "output_text", "text": "x", "annotations": []}
REFUSAL = {"type": "refusal", "refusal": "no"}


def said(content: Any, **changed: Any) -> dict[str, Any]:
    message = {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": content}
    return {"input": [{"role": "user", "content": []}, {**message, **changed}]}


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (said([]), True),
        (said([REFUSAL]), True),
        (said([REFUSAL, TEXT]), True),  # vLLM takes the first part and no other
        (said([TEXT, REFUSAL]), False),
        (said("x"), False),
        (said([], role="user"), False),
        ({"input": "x"}, False),
        ({"input": ["x"]}, False),
        ({"messages": [{"role": "assistant", "content": []}]}, False),
        ([], False),
        (None, False),
    ],
)
def test_a_former_answer_without_text(content: Any, found: bool) -> None:
    message = "input[1].content must begin with a part that has a text."
    assert answer_without_text(content) == (("input[1].content", message) if found else None)


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("/v1/completions", b'{"prompt": "x", "n": 5, "stream": true}', "n must be at most 4 (limits.max_n"),
        ("/v1/completions", b'{"prompt": ["x", "x", "x"], "\\u006e": 4}', "prompt has 3 entries with n=4 each"),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "n": 5}', "n must be at most 4"),
        ("/v1/chat/completions/batch", b'{"messages": [[{"role": "user", "content": "x"}]], "n": 5}', "at most 4"),
        ("/v1/embeddings", b'{"input": ["0","0","0","0","0","0","0","0","0","0","0"]}', "input has 11 entries;"),
        ("/score", b'{"text_1": "x", "text_2": ["0","0","0","0","0","0","0","0","0","0","0"]}', "text_2 has 11"),
        ("/inference/v1/generate", b'{"token_ids": [1], "sampling_params": {"n": 5}}', "sampling_params.n must be"),
        ("/v1/completions", '{"prompt": "x", "n": 5}'.encode("utf-16"), "n must be at most 4 (limits.max_n"),
        ("/v1/responses", b'{"input": [{"role": "assistant", "content": []}]}', "input[0].content must begin with"),
        ("/v1/completions", b'{"prompt": "x"', "JSON"),
        ("/v1/completions", b"\xff", None),
        ("/v1/completions", b'{"prompt": "x", "n": 4}', None),
    ],
)
def test_the_routes_of_vllm_refuse_it_in_their_own_form(path: str, content: bytes, message: str | None) -> None:
    """All that take JSON have the dependency; without an engine, what they let through fails behind it."""
    from vllm.entrypoints.generate.api_router import register_generate_api_routers
    from vllm.entrypoints.pooling.embed.api_router import router as embed
    from vllm.entrypoints.pooling.scoring.api_router import router as scoring
    from vllm.entrypoints.scale_out.token_in_token_out.api_router import router as tokens
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

    app = FastAPI()
    app.state.args = Namespace(log_error_stack=False)
    register_generate_api_routers(app)
    for router in (embed, scoring, tokens):
        app.include_router(router)
    init_exception_handler(app)
    check_requests(app, LIMITS)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
            return await client.post(path, content=content, headers={"content-type": "application/json"})

    answer = asyncio.run(ask())
    if message is None:
        assert "limits." not in answer.text
    else:
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert message in error["message"]
        assert (error["type"], error["code"]) == ("BadRequestError", 400) or message == "JSON"
