"""The configuration of offline generation."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from raylm.config.base import Section
from raylm.config.data import Sources


class GenerateConfig(Section):
    """Everything `raylm generate` needs: one model, prompts or dataset files, and where the answers go."""

    model: str = Field(min_length=1)
    """Hub id, folder or GGUF file; `pkg://PACKAGE/FILE` names a file that an installed Python package ships."""
    adapter: Annotated[str, Field(min_length=1)] | None = None
    """LoRA adapter to answer with: a PEFT adapter folder."""
    prompts: tuple[str, ...] = ()
    """User messages to answer."""
    data: Sources = ()
    """Datasets to answer: each row up to its last user message."""
    output: str = "generations.jsonl"
    """JSONL file of the answers, one object a prompt in the order of the input."""
    system: str | None = None
    """System message put before conversations that have none."""
    max_tokens: int = Field(256, ge=1)
    """Tokens of an answer at most."""
    temperature: float = Field(0.0, ge=0)
    """0 takes the likeliest token each time."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the likeliest tokens that hold this share of the probability."""
    seed: int = Field(0, ge=0)
    """Seed of sampling."""
    max_model_len: Annotated[int, Field(ge=8)] | None = None
    """Longest prompt plus answer in tokens; default: the model's own."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type the engine computes in; `auto` is the model's, or float32 on a CPU without bfloat16 arithmetic."""
    kv_cache_gib: float = Field(1.0, gt=0)
    """Key-value cache on a machine without GPU."""
    num_replicas: int = Field(1, ge=1)
    """Engines working beside each other."""
    batch_size: int = Field(64, ge=1)
    """Prompts an engine receives at once."""
    cluster_address: str | None = None
    """Address of a running cluster; without it as in `cluster.address` of training."""

    @model_validator(mode="after")
    def there_is_something_to_answer(self) -> Self:
        if not self.prompts and not self.data:
            raise ValueError("give prompts or data to answer")
        return self
