"""An engine that many threads ask at once.

One thread alone touches vLLM: it takes what was asked between two steps, so the engine's batch stays full whatever
batches the questions came in. The caller waits on a future.
"""

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any


class Refused(Exception):
    """What vLLM does not take, and why: of one request, not of the engine."""


class EngineLoop:
    """The thread and what it waits for. steps, scheduled: engine steps, and the sum of requests at work in them."""

    def __init__(self, engine: Any, adapter: Any = None) -> None:
        """engine: a vLLM LLMEngine; adapter: the LoRARequest of every prompt, or None."""
        self._engine, self._adapter = engine, adapter
        self._inbox: queue.SimpleQueue[tuple[list[int], Any, Future[Any]]] = queue.SimpleQueue()
        self._futures: dict[str, Future[Any]] = {}
        self._failure: BaseException | None = None
        self._number = 0
        self.steps = self.scheduled = 0
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def ask(self, prompt_token_ids: list[int], params: Any) -> "Future[Any]":
        """vLLM's RequestOutput, once it is finished; the future raises Refused, or what has stopped the engine."""
        future: Future[Any] = Future()
        self._inbox.put((prompt_token_ids, params, future))
        return future

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together."""
        return int(self._engine.vllm_config.model_config.max_model_len)

    def check(self, params: Any) -> None:
        """Raises Refused for what vLLM would refuse of every prompt, such as a schema that it cannot read.

        While nothing is asked.
        """
        prompt = {"prompt_token_ids": [0]}
        tasks = self._engine.get_supported_tasks()
        with _refusals():
            self._engine.input_processor.process_inputs("check", prompt, params, supported_tasks=tasks)

    @property
    def lost_a_process(self) -> bool:
        """Whether the engine stopped because one of its worker processes died."""
        core = getattr(self._engine.engine_core, "engine_core", None)
        return bool(getattr(getattr(core, "model_executor", None), "is_failed", False))

    def _run(self) -> None:
        while True:
            self._take_in()
            if self._failure is None:
                try:
                    outputs = self._engine.step()
                except BaseException as error:  # whoever waits must hear of it
                    self._fail(error)
                    continue
                self.steps += 1
                self.scheduled += len(self._futures)
                for output in outputs:
                    if output.finished:
                        self._futures.pop(output.request_id).set_result(output)

    def _take_in(self) -> None:
        """Takes what was asked; waits for something while there is nothing to do."""
        while True:
            try:
                ids, params, future = self._inbox.get(block=not self._futures)
            except queue.Empty:
                return
            if self._failure is not None:
                future.set_exception(self._failure)
                continue
            name = str(self._number)
            self._number += 1
            try:
                with _refusals():
                    self._engine.add_request(name, {"prompt_token_ids": ids}, params, lora_request=self._adapter)
            except Exception as error:
                future.set_exception(error)
            else:
                self._futures[name] = future

    def _fail(self, error: BaseException) -> None:
        self._failure = error
        for future in self._futures.values():
            future.set_exception(error)
        self._futures.clear()


@contextmanager
def _refusals() -> Iterator[None]:
    """vLLM's own errors about a request are no ValueErrors, others are."""
    from vllm.exceptions import VLLMClientError

    try:
        yield
    except (ValueError, TypeError, VLLMClientError) as error:
        raise Refused(next(iter(str(error).splitlines()), type(error).__name__)) from None
