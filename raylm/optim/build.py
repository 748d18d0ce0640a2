"""An optimizer over the trainable parameters of a model."""

import difflib
import importlib
import inspect
from collections.abc import Iterable
from typing import Any

from raylm.config.training import OptimizerSection
from raylm.errors import ConfigError
from raylm.optim.table import OPTIMIZERS, OptimizerRow


def check_optimizer(section: OptimizerSection) -> None:
    """Raises ConfigError for an unknown optimizer or an option it does not have; imports the optimizer's package."""
    row = _row(section.name)
    known = [
        name for name in inspect.signature(_factory(row)).parameters if name not in ("params", "lr", "weight_decay")
    ]
    for option in section.options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1) or known
            raise ConfigError("optimizer.options", f"{section.name} has no option {option}.", f"Nearest: {near[0]}.")


def build_optimizer(named_parameters: Iterable[tuple[str, Any]], section: OptimizerSection) -> Any:
    """The optimizer with two groups: matrices, which decay, and norms and biases, which do not.

    named_parameters: those that require gradients. Every one is in exactly one group.
    """
    row = _row(section.name)
    parameters = list(named_parameters)
    groups = [
        {"params": [p for _, p in parameters if p.ndim >= 2], "weight_decay": section.weight_decay},
        {"params": [p for _, p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    options = {**row.options, **section.options}
    return _factory(row)([group for group in groups if group["params"]], lr=section.learning_rate, **options)


def _row(name: str) -> OptimizerRow:
    if name not in OPTIMIZERS:
        near = difflib.get_close_matches(name, list(OPTIMIZERS), n=1)
        advice = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(OPTIMIZERS)}."
        raise ConfigError("optimizer.name", f"{name!r} is not an optimizer.", advice)
    return OPTIMIZERS[name]


def _factory(row: OptimizerRow) -> Any:
    module, _, attribute = row.factory.partition(":")
    return getattr(importlib.import_module(module), attribute)
