"""The decoder blocks of a model, found by structure: what a strategy shards, and what a method switches on and off."""

from typing import Any

from torch import nn

from raylm.errors import ModelError
from raylm.models.adapters import base_of


def decoder_blocks(model: Any) -> nn.ModuleList:
    """The list of blocks that a hidden state passes through one after the other, in a transformers or PEFT model.

    It is the largest list of modules of one class whose length is the number of layers that the configuration names.
    Raises ModelError when there is none.
    """
    causal = base_of(model)
    number = getattr(causal.config.get_text_config(), "num_hidden_layers", None)
    lists = [
        module
        for module in causal.modules()
        if isinstance(module, nn.ModuleList) and len(module) == number and len({type(part) for part in module}) == 1
    ]
    if not lists:
        raise ModelError(
            causal.name_or_path, f"no list of {number} decoder blocks was found in it.", "Use training.strategy=ddp."
        )
    return max(lists, key=lambda blocks: sum(parameter.numel() for parameter in blocks.parameters()))
