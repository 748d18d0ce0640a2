"""How much one request may ask for, by its JSON; and through vLLM's own routes, without an engine."""

import asyncio
from argparse import Namespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from raylm.config.limits import LimitsSection
from raylm.serving.amount import excess, limit_requests

LIMITS = LimitsSection(max_n=4, max_sequences=10)


@pytest.mark.parametrize(
    ("content", "parameter"),
    [
        ({"n": 4}, None),
        ({"n": 5}, "n"),
        ({"n": "5"}, "n"),  # pydantic takes it for 5
        ({"n": 5.0}, "n"),
        ({"n": float("inf")}, None),  # the route refuses it
        ({"n": -1}, None),
        ({"n": "many"}, None),
        ({"n": None, "best_of": 5}, "best_of"),
        ({"sampling_params": {"n": 5}}, "sampling_params.n"),
        ({"prompt": ["x"] * 10}, None),
        ({"prompt": ["x"] * 11}, "prompt"),
        ({"prompt": ["x"] * 3, "n": 4}, "prompt"),
        ({"prompt": [[1]] * 11}, "prompt"),
        ({"prompt": [1] * 11}, None),  # one prompt, of ids
        ({"prompt": "x" * 11}, None),
        ({"prompt": []}, None),
        ({"input": ["x"] * 11}, "input"),
        ({"input": [{"role": "user", "content": "x"}] * 11}, None),  # one conversation
        ({"messages": [{"role": "user", "content": "x"}] * 11}, None),
        ({"messages": [[{"role": "user", "content": "x"}]] * 11}, "messages"),
        ({"query": "x", "documents": ["x"] * 11}, "documents"),
        ({"texts": ["x"] * 11}, "texts"),
        ({"data_1": "x", "data_2": [{"content": []}] * 11}, "data_2"),
        ([], None),
        (None, None),
        ("n", None),
    ],
)
def test_what_asks_for_too_much(content: Any, parameter: str | None) -> None:
    found = excess(content, LIMITS)
    assert (found and found[0]) == parameter
    if found:
        assert "(limits.max_" in found[1]


def test_the_sentence_says_what_was_asked_and_what_may_be() -> None:
    assert excess({"prompt": ["x"] * 6, "n": 2}, LIMITS) == (
        "prompt",
        "prompt has 6 entries with n=2 each; a request may ask for 10 in all (limits.max_sequences of the server). "
        "Send several requests.",
    )


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
    limit_requests(app, LIMITS)

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
