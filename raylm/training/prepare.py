"""A model as its method trains it: the base, what the method adds, and what saves memory."""

import fnmatch
import logging
from collections.abc import Sequence
from typing import Any

import torch

from raylm.config import TrainConfig
from raylm.errors import ConfigError, ModelError
from raylm.models.adapters import add_lora, add_new_rows, base_of
from raylm.models.blocks import decoder_blocks
from raylm.models.kernels import use_liger
from raylm.models.load import load_model
from raylm.models.quantize import load_quantized
from raylm.training.hardware import DTYPES

logger = logging.getLogger(__name__)


def load_base(config: TrainConfig, device: torch.device, precision: str) -> Any:
    """The base model on `device`. precision: that of a step, in which NF4 weights are multiplied. Raises ModelError."""
    if config.method.quantized:
        model = load_quantized(config.model, device, compute_dtype=DTYPES[precision])
    else:
        model = load_model(config.model, device, precision=precision)
    return use_liger(model) if config.model.kernels == "liger" else model


def prepared(model: Any, config: TrainConfig) -> Any:
    """The base with what the method adds; only what it trains requires gradients. Raises ModelError."""
    if config.method.adapter:
        model = add_lora(model, config.lora_or_default, seed=config.run.seed)
    elif config.training.method == "new_rows":
        model = add_new_rows(model)
    if config.training.freeze:
        freeze(model, config.training.freeze)
    if config.training.gradient_checkpointing:
        every = int(config.training.gradient_checkpointing)
        try:
            base_of(model).gradient_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
        except ValueError as error:
            raise ModelError(config.model.path, str(error), "Set training.gradient_checkpointing=false.") from None
    if config.training.compile:
        compile_blocks(model)
    return model


def freeze(model: Any, patterns: Sequence[str]) -> None:
    """Takes the parameters whose names hold a pattern out of what is trained; needs no weights.

    Raises ModelError for a pattern that no name holds, and when nothing is left to train.
    """
    named = dict(model.named_parameters())
    frozen: set[str] = set()
    for pattern in patterns:
        held = {name for name in named if fnmatch.fnmatchcase(name, f"*{pattern}*")}
        if not held:
            raise ModelError(
                "training.freeze", f"no parameter's name holds {pattern!r}.", f"One is {next(iter(named))}."
            )
        frozen |= held
    if len(frozen) == len(named):
        raise ModelError("training.freeze", "leaves nothing to train.", "Give fewer patterns.")
    for name in frozen:
        named[name].requires_grad_(False)
    total = sum(parameter.numel() for parameter in named.values())
    count = sum(named[name].numel() for name in frozen)
    logger.info("training.freeze keeps %s of %s parameters (%.2f %%)", f"{count:,}", f"{total:,}", 100 * count / total)


def compile_blocks(model: Any) -> None:
    """Compiles the forward of each decoder block, once for all numbers of tokens.

    Names, hooks and what wraps a block stay outside of what is compiled. Attention one sequence at a time is run as it
    is: its number of products is that of the sequences (models/attention.py).
    """
    # DDP would cut a block's graph at its buckets, which only it can be without.
    torch._dynamo.config.optimize_ddp = False
    for block in decoder_blocks(model):
        block.forward = torch.compile(block.forward, dynamic=True)


def check_compiler() -> None:
    """Raises ConfigError where inductor has no C++ compiler, which it needs on CPUs."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ConfigError(
            "training.compile",
            "no C++ compiler was found on this machine.",
            "Install g++, or set training.compile=false.",
        ) from None
