"""Routes of vLLM's that a model cannot answer say so; vLLM's own app has a bare 404 there, or a 501."""

from typing import Any

from raylm.serving.asgi import Message, Receive, Send, error_body, send_json

_OF_MODELS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/embeddings",
    "/v2/embed",
    "/classify",
    "/pooling",
    "/score",
    "/v1/score",
    "/rerank",
    "/v1/rerank",
    "/v2/rerank",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/v1/systemone",
)
_SYSTEMONE = "/v1/systemone"  # vLLM's API of structured decisions, which only a few architectures have


def refuse_what_the_model_cannot(app: Any, name: str) -> None:
    """Adds a route for each that is not there.

    app: vLLM's FastAPI app, with its state. It has routes by the tasks of the model: generation, or pooling.
    """
    from starlette.routing import Route

    if getattr(app.state, "serving_structured_decisions", None) is None:
        app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") != _SYSTEMONE]
    there = {getattr(route, "path", "") for route in app.router.routes}
    served = ", ".join(path for path in _OF_MODELS if path in there)
    for path in _OF_MODELS:
        if path not in there:
            message = f"The model `{name}` does not serve {path}. It serves {served}."
            app.router.routes.append(Route(path, _Refusal(message), methods=["POST"], include_in_schema=False))


class _Refusal:
    """404, as for a model that is not there."""

    def __init__(self, message: str) -> None:
        self._body = error_body(message, "NotFoundError", 404)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        await send_json(send, 404, self._body)
