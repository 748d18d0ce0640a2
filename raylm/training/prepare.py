"""A model as its method trains it: the base, what the method adds, and what saves memory."""

from typing import Any

import torch

from raylm.config import TrainConfig
from raylm.models.adapters import add_lora, add_new_rows, base_of
from raylm.models.load import load_model
from raylm.models.quantize import load_quantized
from raylm.training.hardware import DTYPES


def load_base(config: TrainConfig, device: torch.device, precision: str) -> Any:
    """The base model on `device`. precision: that of a step, in which NF4 weights are multiplied. Raises ModelError."""
    if config.method.quantized:
        return load_quantized(config.model, device, compute_dtype=DTYPES[precision])
    return load_model(config.model, device)


def prepared(model: Any, config: TrainConfig) -> Any:
    """The base with what the method adds; only what it trains requires gradients. Raises ModelError."""
    if config.method.adapter:
        model = add_lora(model, config.lora_or_default, seed=config.run.seed)
    elif config.training.method == "new_rows":
        model = add_new_rows(model)
    if config.training.gradient_checkpointing:
        base = base_of(model)
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model
