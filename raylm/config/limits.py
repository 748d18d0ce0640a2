"""What a server takes on at once, and from whom."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from raylm.config.base import Section

Positive = Annotated[int, Field(ge=1)]


class LimitsSection(Section):
    """Limits of the requests that reach the engine (those with a body: POST); listing and metrics are never held."""

    max_concurrent: Positive | None = None
    """Requests in the engine at once; default: as many as come, and the engine queues them."""
    max_queue: Annotated[int, Field(ge=0)] | None = None
    """Requests that wait beyond `max_concurrent`; one more is answered 429. Default: as many as `max_concurrent`."""
    request_timeout_s: Annotated[float, Field(gt=0)] | None = None
    """Seconds a request may take, waiting included; over it 504, or an error event in a stream that has begun."""
    max_request_mib: float = Field(16.0, gt=0)
    """Largest request body in MiB; a larger one is answered 413."""
    max_n: Annotated[int, Field(ge=1, le=16384)] = 128
    """Answers to one prompt that a request may ask for (`n`); more are answered 400."""
    max_sequences: Positive = 2048
    """Prompts of one request times its `n`: more are answered 400."""
    requests_per_minute: Positive | None = None
    """Requests of one API key per minute, where the key has no figure of its own; over it 429."""
    tokens_per_minute: Positive | None = None
    """Prompt and generated tokens of one API key per minute, where the key has no figure of its own; over it 429."""

    @model_validator(mode="after")
    def a_queue_needs_a_limit_before_it(self) -> Self:
        if self.max_queue is not None and self.max_concurrent is None:
            raise ValueError("max_queue has no meaning without max_concurrent: set both")
        return self

    @property
    def queue_places(self) -> int:
        """Requests that may wait; 0 where nothing limits those that run."""
        return (self.max_concurrent or 0) if self.max_queue is None else self.max_queue

    @property
    def max_request_bytes(self) -> int:
        return int(self.max_request_mib * 2**20)
