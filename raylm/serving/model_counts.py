"""Requests, tokens and latencies by adapter, for /metrics: vLLM 0.32 counts all of them under the base model's name."""

from collections.abc import Iterable
from typing import Any

_TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)


class ModelCounts:
    """What one replica has answered, counted when a request ends. The label `adapter` is empty for the model itself.

    model: the name that vLLM's figures have as `model_name`.
    """

    def __init__(self, model: str) -> None:
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self._model, self._registry = model, CollectorRegistry()
        labels = ["model_name", "adapter"]
        self._requests = Counter(
            "raylm_adapter_requests",
            "Engine requests that ended, those of clients that left too.",
            labels,
            registry=self._registry,
        )
        self._tokens = Counter(
            "raylm_adapter_tokens", "Tokens read and generated.", [*labels, "kind"], registry=self._registry
        )
        self._first = Histogram(
            "raylm_adapter_time_to_first_token_seconds",
            "Time to the first token of each answer.",
            labels,
            buckets=_TTFT_S,
            registry=self._registry,
        )
        self._each = Histogram(
            "raylm_adapter_time_per_output_token_seconds",
            "Mean time between the tokens of each answer.",
            labels,
            buckets=_TOKEN_S,
            registry=self._registry,
        )

    def add(self, states: Iterable[Any]) -> None:
        """states: vLLM's RequestState of each engine request, which is over."""
        for state in states:
            adapter = (state.lora_name or "").rpartition("@")[0]  # the engine knows it as NAME@VERSION (adapters.py)
            labels = {"model_name": self._model, "adapter": adapter}
            self._requests.labels(**labels).inc()
            if state.request_index == 0:  # answers to one prompt (n) share it
                self._tokens.labels(**labels, kind="prompt").inc(state.prompt_len)
            generated = 0 if state.detokenizer is None else state.detokenizer.num_output_tokens()
            if generated:
                self._tokens.labels(**labels, kind="generated").inc(generated)
            stats = state.stats
            if stats is None or not generated:  # engine.disable_log_stats
                continue
            self._first.labels(**labels).observe(stats.first_token_latency)
            if generated > 1:
                self._each.labels(**labels).observe((stats.last_token_ts - stats.first_token_ts) / (generated - 1))

    def page(self) -> str:
        """In Prometheus' text format."""
        from prometheus_client import generate_latest

        return generate_latest(self._registry).decode()
