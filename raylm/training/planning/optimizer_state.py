"""What an optimizer keeps for a parameter, found by letting it step one of a few elements."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from raylm.config import TrainConfig
from raylm.config.training import OptimizerSection
from raylm.optim.build import build_optimizer, is_hidden
from raylm.optim.table import optimizer_row
from raylm.training.strategies.owned import BUCKET_ELEMENTS, owners_of

_OFFSETS = (7, 11, 13, 17, 19)
"""Of the dimensions of the small parameter, all unequal: a slot's dimensions tell which of them it has."""
_BLOCK = 256
"""Elements that share a scale in 8-bit state."""


def state_bytes(
    section: OptimizerSection, shapes: Sequence[Sequence[int]], *, names: Sequence[str] | None = None
) -> int:
    """Bytes of the optimizer's state for parameters of these shapes, after its first step.

    names: of the parameters, in the same order; some optimizers treat matrices of decoder blocks apart.
    """
    row, options = optimizer_row(section.name), section.options
    if row.state_bits == 8:
        fewest = options.get("min_8bit_size", row.options["min_8bit_size"])
        return sum(row.state_full * _quantised(math.prod(shape), int(str(fewest))) for shape in shapes)
    plain = section.model_copy(update={"learning_rates": {}})
    key = plain.model_dump_json()
    found = names if names is not None else [""] * len(shapes)
    return sum(
        _bytes_of(key, tuple(shape), is_hidden(name, len(shape))) for name, shape in zip(found, shapes, strict=True)
    )


def is_owned(config: TrainConfig, strategy: str) -> bool:
    """Whether one rank steps each parameter whole (strategies/owned.py)."""
    row = optimizer_row(config.optimizer.name)
    return bool(row.whole) or (row.estimates and strategy == "deepspeed")


def owned_bytes(named: Sequence[tuple[str, nn.Parameter]], config: TrainConfig, ranks: int) -> tuple[int, int]:
    """State of the rank with the most, and what a step exchanges at a time: ranges that are sent and received, and the
    whole, of weight and gradient each."""
    owners = owners_of({name: parameter.numel() for name, parameter in named}, ranks)
    states, exchanges = [], []
    for rank in range(ranks):
        own = {name: parameter.shape for name, parameter in named if owners[name] == rank}
        sizes = [shape.numel() for shape in own.values()]
        states.append(state_bytes(config.optimizer, list(own.values()), names=list(own)))
        exchanges.append(min(sum(sizes), max([BUCKET_ELEMENTS, *sizes])))
    return max(states), 6 * max(exchanges) * 4


def _quantised(elements: int, fewest: int) -> int:
    """Bytes of a tensor in 8 bits with a scale for each block, or in fp32 where it has too few elements."""
    return 4 * elements if elements < fewest else elements + 4 * -(-elements // _BLOCK)


@lru_cache(maxsize=4096)
def _bytes_of(key: str, shape: tuple[int, ...], hidden: bool) -> int:
    section = OptimizerSection.model_validate_json(key)
    limit = int({**optimizer_row(section.name).options, **section.options}.get("max_precondition_dim", 0))
    total = 0
    tall = len(shape) > 1 and shape[-2] >= shape[-1]
    for dimensions, element_size in _slots(key, len(shape), hidden, tall):
        sizes = [shape[place] if place >= 0 else min(-place, *shape[-2:]) for place in dimensions]
        square = len(dimensions) == 2 and dimensions[0] == dimensions[1]
        total += 0 if square and limit and sizes[0] > limit else element_size * math.prod(sizes)
    return total


@lru_cache(maxsize=64)
def _slots(key: str, ndim: int, hidden: bool, tall: bool) -> tuple[tuple[tuple[int, ...], int], ...]:
    """For each slot: the places of its dimensions among the parameter's (less than 0: another size, such as a rank, but
    no more than the parameter's), and bytes of an element."""
    section = OptimizerSection.model_validate_json(key)
    rank = int({**optimizer_row(section.name).options, **section.options}.get("rank", 0))
    sizes = [rank + offset for offset in _OFFSETS[:ndim]]  # all above a rank
    sizes = sizes[::-1] if tall else sizes
    parameter = nn.Parameter(torch.rand(sizes))
    optimizer: Any = build_optimizer([("0.experts.weight" if hidden else "weight", parameter)], section)
    parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    found = []
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor):
            places = tuple(sizes.index(size) if size in sizes else -size for size in value.shape)
            found.append((places, value.element_size()))
    return tuple(found)
