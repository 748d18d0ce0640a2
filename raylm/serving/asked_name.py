"""`model` of an answer is the name that was asked for.

vLLM 0.32 answers under the first of its served names whatever alias the request gave. Every route asks the same object
first whether the name is known and then under which name to answer, within one request's context: the first remembers.
"""

from contextvars import ContextVar
from typing import Any

from raylm.serving.asgi import App, Message, Receive, Send

_asked: ContextVar[str | None] = ContextVar("asked", default=None)


def answer_as_asked(models: Any) -> None:
    """models: vLLM's `OpenAIServingModels` of one server."""
    knows, name_of = models.is_base_model, models.model_name

    def is_base_model(model_name: str) -> bool:
        known: bool = knows(model_name)
        if known:
            _asked.set(model_name)
        return known

    def model_name(lora_request: Any = None) -> str:
        asked = _asked.get() if lora_request is None else None
        return asked or name_of(lora_request)

    models.is_base_model, models.model_name = is_base_model, model_name


def each_request_anew(app: App) -> App:
    """ASGI middleware: no request knows what another asked for. uvicorn starts one that was sent ahead (pipelined) in
    the context of the one before."""

    async def forgetful(scope: Message, receive: Receive, send: Send) -> None:
        token = _asked.set(None)
        try:
            await app(scope, receive, send)
        finally:
            _asked.reset(token)

    return forgetful
