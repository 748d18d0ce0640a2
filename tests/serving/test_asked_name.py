"""`model` of an answer, without an engine."""

import asyncio
from typing import Any

from raylm.serving.asked_name import answer_as_asked, each_request_anew


class Models:
    """What `answer_as_asked` needs of vLLM's `OpenAIServingModels`."""

    def is_base_model(self, model_name: str) -> bool:
        return model_name in ("m", "alias")

    def model_name(self, lora_request: Any = None) -> str:
        return "m"


def test_a_request_does_not_know_what_the_one_before_it_asked_for() -> None:
    """uvicorn runs a pipelined request in the context of the one before."""
    models = Models()
    answer_as_asked(models)
    answers = []

    async def app(scope: Any, _receive: Any, _send: Any) -> None:
        if scope["model"] is not None:
            assert models.is_base_model(scope["model"])
        answers.append(models.model_name())

    async def steps() -> None:
        for model in ("alias", None):
            await each_request_anew(app)({"model": model}, None, None)  # type: ignore[arg-type]

    asyncio.run(steps())
    assert answers == ["alias", "m"]
