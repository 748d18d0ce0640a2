"""An optimizer over the trainable parameters of a model."""

import fnmatch
import importlib
import inspect
import re
from collections.abc import Iterable, Sequence
from typing import Any

from raylm.config.training import OptimizerSection
from raylm.errors import ConfigError, nearest
from raylm.optim.counted import counted
from raylm.optim.table import OPTIMIZERS, OptimizerRow, averaging_option, optimizer_row


def check_optimizer(section: OptimizerSection) -> None:
    """Raises ConfigError for an unknown optimizer or an option it does not have; imports the optimizer's package."""
    row = optimizer_row(section.name)
    known = option_names(row)
    for option in section.options:
        if option not in known:
            raise ConfigError("optimizer.options", f"{section.name} has no option {option}.", nearest(option, known))
    if section.options:
        import torch

        try:  # its constructor knows what its options may be
            plain = section.model_copy(update={"learning_rates": {}})
            build_optimizer([("0.weight", torch.nn.Parameter(torch.zeros(2, 2)))], plain)
        except (TypeError, ValueError, IndexError, AssertionError) as error:
            given = ", ".join(f"{name}={value!r}" for name, value in section.options.items())
            raise ConfigError("optimizer.options", f"{section.name} does not take {given}: {error}.") from None


def option_names(row: OptimizerRow) -> list[str]:
    """What `optimizer.options` may hold."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        name
        for name, parameter in inspect.signature(_factory(row)).parameters.items()
        if name not in ("params", "lr", "weight_decay") and parameter.kind not in kinds
    ]


def build_optimizer(
    named_parameters: Iterable[tuple[str, Any]], section: OptimizerSection, *, head_dim: int | None = None
) -> Any:
    """The optimizer with a group for each learning rate, parted in matrices, which decay, and norms and biases, which
    do not; embeddings as the section says.

    named_parameters: those that require gradients. Every one is in exactly one group. head_dim: rows of an attention
    head, which some treat as one; without it, rows by themselves. Raises ConfigError for a pattern
    of `learning_rates` that no name holds.
    """
    row = optimizer_row(section.name)
    groups: dict[tuple[float, bool, bool, int], list[Any]] = {}
    unused = set(section.learning_rates)
    for name, parameter in named_parameters:
        held = [pattern for pattern in section.learning_rates if fnmatch.fnmatchcase(name, f"*{pattern}*")]
        unused -= set(held)
        rate = section.learning_rates[held[0]] if held else section.learning_rate
        hidden = row.hidden_apart and is_hidden(name, parameter.ndim)
        rows = head_dim if head_dim and row.heads_apart and _has_heads(name, parameter.shape, head_dim) else 1
        decays = is_matrix(name, parameter.ndim) and (section.decay_embeddings or not _EMBEDDING.search(name))
        groups.setdefault((rate, decays, hidden, rows), []).append(parameter)
    if unused:
        raise ConfigError("optimizer.learning_rates", f"no trainable parameter's name holds {sorted(unused)[0]!r}.")
    # The default rate first, matrices before the rest: the first group's rate is the one that is shown.
    ordered = sorted(groups.items(), key=lambda item: (item[0][0] != section.learning_rate, not item[0][1]))
    factory = _factory(row)
    optimizer = (counted(factory, row.counters) if row.counters else factory)(
        [
            {
                "params": members,
                "lr": rate,
                "weight_decay": section.weight_decay if decays else 0.0,
                **({"hidden": hidden} if row.hidden_apart else {}),
                **({"block_rows": rows} if row.heads_apart else {}),
            }
            for (rate, decays, hidden, rows), members in ordered
        ],
        lr=section.learning_rate,
        **{**row.options, **section.options},
    )
    optimizer.takes_whole = bool(row.whole)  # strategies that cut weights bring them together
    return optimizer


def averaging_beta(section: OptimizerSection) -> float | None:
    """The share of the averaged weights in those that are trained; None where an optimizer averages none."""
    row = optimizer_row(section.name)
    if (option := averaging_option(row)) is None:
        return None
    value = {**row.options, **section.options}[option]
    return float(value if option == "momentum" else value[0])


# One for each head or expert, and so of two dimensions, in Command R+, Chameleon and GPT-OSS.
_NORM_OR_BIAS = re.compile(r"(norm\d*\.weight|bias)$")
_EXPERTS = re.compile(r"(experts|moe)\.")
"""Other parameters of three dimensions are kernels of convolutions."""
_EMBEDDING = re.compile(r"(^|\.)(\w*embed(ding)?s?(_\w+)?|wte|wpe)\.")


def is_matrix(name: str, ndim: int) -> bool:
    """Whether a parameter multiplies vectors; norms and biases do not, whatever their shape."""
    return ndim >= 2 and _NORM_OR_BIAS.search(name) is None


def is_hidden(name: str, ndim: int) -> bool:
    """Whether a parameter is a matrix of a decoder block, or one of each expert, (experts, rows, columns): blocks have
    numbers in their parameters' names."""
    matrices = ndim == 2 or (ndim == 3 and _EXPERTS.search(name) is not None)
    return matrices and is_matrix(name, ndim) and re.search(r"(^|\.)\d+\.", name) is not None


def _has_heads(name: str, shape: Sequence[int], head_dim: int) -> bool:
    """Whether a parameter is the matrix of queries or keys alone."""
    named = re.search(r"\b(q_proj|k_proj|query|key)\.weight$", name) is not None
    return named and len(shape) == 2 and shape[0] % head_dim == 0


def _factory(row: OptimizerRow) -> Any:
    module, _, attribute = row.factory.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "bitsandbytes":
            raise
        raise ConfigError(
            "optimizer.name", f"{_name_of(row)} needs the package bitsandbytes.", "pip install 'raylm[quantization]'."
        ) from None


def _name_of(row: OptimizerRow) -> str:
    return next(name for name, known in OPTIMIZERS.items() if known is row)
