"""The configuration of a draft model's distillation."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from raylm.config.base import Section
from raylm.config.data import Sources


class DistillConfig(Section):
    """Everything `raylm distill-draft` needs: the model to draft for, prompts, the draft's size, and where it goes."""

    model: str = Field(min_length=1)
    """Model to draft for: hub id, folder or GGUF file; `pkg://PACKAGE/FILE` names a file of an installed package."""
    data: Sources = Field(min_length=1)
    """Datasets whose rows the model answers, each up to its last user message; the draft learns from the answers."""
    output: str = Field(min_length=1)
    """Folder for the draft; it must be absent or empty."""
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Blocks of the model that the draft consists of, from 0."""
    num_layers: Annotated[int, Field(ge=1)] | None = None
    """Number of blocks, evenly spaced from the first to the last; default: an eighth of the model's."""
    hidden_size: Annotated[int, Field(ge=1)] | None = None
    """Width of a new draft with random weights, in place of blocks of the model. It needs far more training."""
    max_tokens: int = Field(256, ge=1)
    """Tokens of an answer at most."""
    temperature: float = Field(0.0, ge=0)
    """Of the answers; 0 takes the likeliest token each time."""
    steps: int = Field(300, ge=1)
    """Optimizer steps of the training."""
    learning_rate: float = Field(5e-4, gt=0)
    """Peak learning rate."""
    train: dict[str, Any] = {}
    """Further settings of the training, as in `raylm train`, such as `training.global_batch_size`; they win."""
    num_speculative_tokens: int = Field(4, ge=1, le=128)
    """Tokens the draft guesses at a time in the measurements."""
    eval_rows: int = Field(16, ge=1)
    """Rows, the last ones, that are not trained on: acceptance is measured with them."""
    max_model_len: Annotated[int, Field(ge=8)] | None = None
    """Longest prompt plus answer in tokens; default: the model's own."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type the engines compute in, as in `raylm generate`."""
    kv_cache_gib: float = Field(1.0, gt=0)
    """Key-value cache on a machine without GPU."""
    num_replicas: int = Field(1, ge=1)
    """Engines that answer beside each other."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of sampling, training and new weights."""
    cluster_address: str | None = None
    """Address of a running cluster; without it as in `cluster.address` of training."""

    @model_validator(mode="after")
    def the_draft_has_one_shape(self) -> Self:
        if self.layers is not None and (self.num_layers is not None or self.hidden_size is not None):
            other = "num_layers" if self.num_layers is not None else "hidden_size"
            raise ValueError(f"layers excludes {other}. Drop one")
        if self.layers is not None and not self.layers:
            raise ValueError("layers is empty. Name one at least, or drop it")
        return self
