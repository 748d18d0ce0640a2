"""What an optimizer keeps for a parameter, found by letting it step one of a few elements."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from raylm.config.training import OptimizerSection
from raylm.optim.build import build_optimizer, is_hidden

_SIZES = (7, 11, 13, 17, 19)
"""Of the dimensions of the small parameter, all unequal: a slot's dimensions tell which of them it has."""


def state_bytes(
    section: OptimizerSection, shapes: Sequence[Sequence[int]], *, names: Sequence[str] | None = None
) -> int:
    """Bytes of the optimizer's state for parameters of these shapes, after its first step.

    names: of the parameters, in the same order; some optimizers treat matrices of decoder blocks apart.
    """
    plain = section.model_copy(update={"learning_rates": {}})
    key = plain.model_dump_json()
    found = names if names is not None else [""] * len(shapes)
    return sum(
        _bytes_of(key, tuple(shape), is_hidden(name, len(shape))) for name, shape in zip(found, shapes, strict=True)
    )


@lru_cache(maxsize=4096)
def _bytes_of(key: str, shape: tuple[int, ...], hidden: bool) -> int:
    total = 0
    for dimensions, element_size in _slots(key, len(shape), hidden):
        total += element_size * math.prod(shape[place] if place >= 0 else 1 for place in dimensions)
    return total


@lru_cache(maxsize=64)
def _slots(key: str, ndim: int, hidden: bool) -> tuple[tuple[tuple[int, ...], int], ...]:
    """For each slot: the places of its dimensions among the parameter's (-1 for others), and bytes of an element."""
    section = OptimizerSection.model_validate_json(key)
    parameter = nn.Parameter(torch.ones(_SIZES[:ndim]))
    optimizer: Any = build_optimizer([("0.weight" if hidden else "weight", parameter)], section)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    found = []
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor):
            places = tuple(_SIZES.index(size) if size in _SIZES[:ndim] else -1 for size in value.shape)
            found.append((places, value.element_size()))
    return tuple(found)
