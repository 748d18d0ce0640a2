"""Tokens and aborts at vLLM's own output processor, without an engine: what a running server cannot be made to show.

tests/serving/test_endpoint.py compares with the usage that vLLM reports.
"""

import asyncio
import copy
from contextlib import suppress
from typing import Any

import pytest
from fastapi import FastAPI, Request
from prometheus_client.parser import text_string_to_metric_families

from raylm.config.limits import LimitsSection
from raylm.serving.guard import GuardSettings, guarded
from raylm.serving.model_counts import ModelCounts
from raylm.serving.usage import Metered, watch


class Engine:
    """What `Metered` needs of AsyncLLM, whose `abort` does the same and tells the engine's process."""

    def __init__(self, tokenizer: Any) -> None:
        from vllm.v1.engine.output_processor import OutputProcessor

        self.output_processor = OutputProcessor(tokenizer, log_stats=False)
        self.aborted: list[str] = []

    async def abort(self, ids: list[str], *, internal: bool) -> None:
        self.aborted += self.output_processor.abort_requests(ids, internal)

    def add(self, name: str, *, n: int = 1, lora: Any = None) -> Any:
        """As AsyncLLM adds a request: one of n answers is a child of its own. Returns the queue of its outputs."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine import EngineCoreRequest
        from vllm.v1.engine.output_processor import RequestOutputCollector
        from vllm.v1.engine.parallel_sampling import ParentRequest

        kind = RequestOutputKind.FINAL_ONLY  # a whole answer: no output tells how far it is
        request = EngineCoreRequest(
            request_id=name,
            prompt_token_ids=[5, 6, 7],
            mm_features=None,
            sampling_params=SamplingParams(max_tokens=20, n=n, output_kind=kind),
            pooling_params=None,
            arrival_time=0.0,
            lora_request=lora,
            cache_salt=None,
            data_parallel_rank=None,
            external_req_id=f"client's {name}",
        )
        queue = RequestOutputCollector(kind, name)
        if n == 1:
            self.output_processor.add_request(request, "x", None, 0, queue)
            return queue
        parent = ParentRequest(request)
        for index in range(n):
            child = copy.copy(request)
            child.request_id, child.sampling_params = parent.get_child_info(index)
            self.output_processor.add_request(child, "x", parent, index, queue)
        return queue

    def generate(self, name: str, tokens: int, *, last: bool = False) -> None:
        from vllm.v1.engine import EngineCoreOutput, FinishReason

        reason = FinishReason.LENGTH if last else None
        output = EngineCoreOutput(request_id=name, new_token_ids=[40] * tokens, finish_reason=reason)
        self.output_processor.process_outputs([output])


@pytest.fixture
def engine(tokenizer: Any) -> Engine:
    engine = Engine(tokenizer)
    watch(engine)
    return engine


def test_a_cancelled_request_is_counted_and_ends_in_the_engine(engine: Engine) -> None:
    """Known fault W06: one answer is whole, two of another are on their way, a third is asked for afterwards."""
    left_behind: list[asyncio.Task[None]] = []
    sent: list[Any] = []

    async def app(_scope: Any, _receive: Any, _send: Any) -> None:
        engine.add("a")
        engine.add("b", n=2)
        engine.generate("a", 3)
        engine.generate("0_b", 1)
        engine.generate("a", 1, last=True)

        async def handler() -> None:
            await asyncio.sleep(0.1)
            engine.add("late")

        left_behind.append(asyncio.create_task(handler()))
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message)

    async def test() -> None:
        request = asyncio.create_task(Metered(app, engine)({"type": "http"}, None, send))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        request.cancel()
        await asyncio.wait([request])
        assert request.cancelled()
        await asyncio.wait(left_behind)
        assert left_behind[0].cancelled()

    asyncio.run(test())
    assert sent == [{"type": "raylm.usage", "prompt_tokens": 6, "completion_tokens": 5}]
    assert sorted(engine.aborted) == ["0_b", "1_b"]
    processor = engine.output_processor
    assert (processor.request_states, processor.parent_requests, dict(processor.external_req_ids)) == ({}, {}, {})


@pytest.mark.parametrize("how", ["late", "disconnect", "cancelled"])
def test_a_route_of_vllm_that_ends_early_ends_in_the_engine(engine: Engine, how: str) -> None:
    """With the decorator of vLLM's routes, whose handler goes on when the route itself is cancelled."""
    from vllm.entrypoints.serve.utils.api_utils import with_cancellation

    app = FastAPI()
    handlers: list[asyncio.Task[Any]] = []

    @app.post("/")
    @with_cancellation
    async def route(body: dict[str, Any], raw_request: Request) -> Any:
        handlers.append(asyncio.current_task())  # type: ignore[arg-type]
        output = await engine.add(body["name"], n=2).get()
        return {"finished": output.finished}

    limits = LimitsSection(request_timeout_s=0.3 if how == "late" else 60)
    app.middleware_stack = guarded(
        Metered(app.build_middleware_stack(), engine), GuardSettings(limits=limits, access_log=False)
    )

    async def test() -> None:
        sent: list[Any] = []
        gone = asyncio.Event()
        body = [{"type": "http.request", "body": b'{"name": "a"}', "more_body": False}]

        async def receive() -> Any:
            if body:
                return body.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json"), (b"content-length", b"13")]
        scope = {"type": "http", "path": "/", "method": "POST", "headers": headers, "query_string": b""}
        request = asyncio.create_task(app(scope, receive, send))
        await asyncio.sleep(0.1)
        assert len(engine.output_processor.request_states) == 2
        if how == "disconnect":
            gone.set()
        elif how == "cancelled":
            request.cancel()
        await asyncio.wait([request], timeout=5)
        await asyncio.wait(handlers, timeout=5)
        await asyncio.sleep(0.05)
        assert request.done()
        if how == "late":
            assert sent[0]["status"] == 504
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others  # nothing listens or works for a request that is over

    asyncio.run(test())
    if how == "disconnect":  # vLLM's own way: the handler is cancelled, and AsyncLLM.generate aborts
        assert handlers[0].cancelled()
    else:
        assert sorted(engine.aborted) == ["0_a", "1_a"]
        assert engine.output_processor.request_states == {}


def test_requests_beside_each_other_are_counted_apart(engine: Engine) -> None:
    async def app(scope: Any, _receive: Any, _send: Any) -> None:
        name, tokens = scope["name"], scope["tokens"]

        async def handler() -> None:  # vLLM's routes work in a task of their own
            engine.add(name)
            await asyncio.sleep(0.01)
            engine.generate(name, tokens, last=True)

        await asyncio.create_task(handler())

    async def one(number: int) -> int:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        await Metered(app, engine)({"type": "http", "name": f"r{number}", "tokens": number}, None, send)  # type: ignore[arg-type]
        [usage] = sent
        return int(usage["completion_tokens"])

    async def test() -> list[int]:
        return await asyncio.gather(*(one(number) for number in range(1, 20)))

    assert asyncio.run(test()) == list(range(1, 20))


def test_adapters_are_counted_apart(engine: Engine) -> None:
    """One of several answers, one that was left early, and an adapter's; a page without engine requests changes
    nothing."""
    from vllm.lora.request import LoRARequest

    counts = ModelCounts("base")

    async def app(scope: Any, _receive: Any, _send: Any) -> None:
        if scope["name"] == "n":
            engine.add("n", n=2)
            engine.generate("0_n", 3, last=True)
            engine.generate("1_n", 2, last=True)
        elif scope["name"] == "adapter":
            engine.add("a", lora=LoRARequest("law@2024@abc", 7, "/nowhere"))
            engine.generate("a", 4)
            raise asyncio.CancelledError

    async def nowhere(_message: Any) -> None:
        pass

    for name in ("n", "adapter", "nothing"):
        with suppress(asyncio.CancelledError):
            asyncio.run(Metered(app, engine, counts=counts)({"type": "http", "name": name}, None, nowhere))  # type: ignore[arg-type]
    found = {
        (sample.labels["adapter"], sample.labels.get("kind", "requests")): sample.value
        for family in text_string_to_metric_families(counts.page())
        for sample in family.samples
        if sample.name in ("raylm_adapter_requests_total", "raylm_adapter_tokens_total")
    }
    assert found == {
        ("", "requests"): 2,
        ("", "prompt"): 3,
        ("", "generated"): 5,
        ("law@2024", "requests"): 1,
        ("law@2024", "prompt"): 3,
        ("law@2024", "generated"): 4,
    }


def test_what_has_no_tokens_says_nothing(engine: Engine) -> None:
    sent: list[Any] = []

    async def app(_scope: Any, _receive: Any, _send: Any) -> None:
        pass

    asyncio.run(Metered(app, engine)({"type": "http"}, None, sent.append))  # type: ignore[arg-type]
    assert sent == []
