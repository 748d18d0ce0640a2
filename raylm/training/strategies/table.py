"""The strategies by name."""

import importlib
from typing import Any

STRATEGIES = {
    "single": "raylm.training.strategies.single:SingleStrategy",
    "ddp": "raylm.training.strategies.ddp:DdpStrategy",
    "fsdp": "raylm.training.strategies.fsdp:FsdpStrategy",
    "deepspeed": "raylm.training.strategies.deepspeed:DeepspeedStrategy",
}


def strategy_class(name: str) -> Any:
    """The class of a strategy, imported on use."""
    module, _, attribute = STRATEGIES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
