"""An optimizer over the trainable parameters of a model."""

import difflib
import fnmatch
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
    """The optimizer with a group for each learning rate, parted in matrices, which decay, and norms and biases, which
    do not.

    named_parameters: those that require gradients. Every one is in exactly one group. Raises ConfigError for a pattern
    of `learning_rates` that no name holds.
    """
    row = _row(section.name)
    groups: dict[tuple[float, bool], list[Any]] = {}
    unused = set(section.learning_rates)
    for name, parameter in named_parameters:
        held = [pattern for pattern in section.learning_rates if fnmatch.fnmatchcase(name, f"*{pattern}*")]
        unused -= set(held)
        rate = section.learning_rates[held[0]] if held else section.learning_rate
        groups.setdefault((rate, parameter.ndim >= 2), []).append(parameter)
    if unused:
        raise ConfigError("optimizer.learning_rates", f"no trainable parameter's name holds {sorted(unused)[0]!r}.")
    # The default rate first, matrices before the rest: the first group's rate is the one that is shown.
    ordered = sorted(groups.items(), key=lambda item: (item[0][0] != section.learning_rate, not item[0][1]))
    return _factory(row)(
        [
            {"params": members, "lr": rate, "weight_decay": section.weight_decay if decays else 0.0}
            for (rate, decays), members in ordered
        ],
        lr=section.learning_rate,
        **{**row.options, **section.options},
    )


def _row(name: str) -> OptimizerRow:
    if name not in OPTIMIZERS:
        near = difflib.get_close_matches(name, list(OPTIMIZERS), n=1)
        advice = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(OPTIMIZERS)}."
        raise ConfigError("optimizer.name", f"{name!r} is not an optimizer.", advice)
    return OPTIMIZERS[name]


def _factory(row: OptimizerRow) -> Any:
    module, _, attribute = row.factory.partition(":")
    return getattr(importlib.import_module(module), attribute)
