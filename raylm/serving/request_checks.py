"""What vLLM's routes are to refuse beyond what they refuse themselves, in vLLM's own form."""

from collections.abc import Mapping
from typing import Any

from raylm.config.limits import LimitsSection
from raylm.serving.amount import excess


def check_requests(app: Any, limits: LimitsSection | None) -> None:
    """From now on a request for too much, or one that vLLM 0.32 would answer 500, is answered 400 before anything is
    tokenised.

    app: vLLM's FastAPI app. All of its routes that take JSON depend on `validate_json_request`; the parsed body is at
    hand there. limits: None where a gateway looks at them.
    """
    from fastapi import Request
    from vllm.entrypoints.serve.utils.api_utils import validate_json_request
    from vllm.exceptions import VLLMValidationError

    async def validated(raw_request: Request) -> None:
        await validate_json_request(raw_request)
        try:
            content = await raw_request.json()
        except ValueError:
            return  # of a route that parses the body itself
        found = excess(content, limits) if limits is not None else None
        if found := found or answer_without_text(content):
            parameter, message = found
            raise VLLMValidationError(message, parameter=parameter)

    app.dependency_overrides[validate_json_request] = validated


def answer_without_text(content: Any) -> tuple[str, str] | None:
    """As `excess`, of a former answer in the `input` of /v1/responses: vLLM takes the text of its first part, and fails
    where that is a refusal or is not there.

    content: the body as JSON, of any route, not checked yet.
    """
    items = content.get("input") if isinstance(content, Mapping) else None
    for index, item in enumerate(items if isinstance(items, list) else ()):
        content = item.get("content") if isinstance(item, Mapping) and item.get("role") == "assistant" else None
        if not isinstance(content, list):
            continue
        first = content[0] if content else None
        if not isinstance(first, Mapping) or not isinstance(first.get("text"), str):
            where = f"input[{index}].content"
            return where, f"{where} must begin with a part that has a text."
    return None
