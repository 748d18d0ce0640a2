"""Weights and optimizer state as one flat mapping of named tensors, independent of any strategy.

`model/NAME` is a trainable weight, `optimizer/NAME/KEY` a tensor of its state (a scalar counter becomes a 0-d tensor).
Weights that do not train are the base model's and are not in it. Each rank holds pieces of the tensors; all ranks'
pieces together are the state.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raylm.errors import CheckpointError

Named = Sequence[tuple[str, nn.Parameter]]


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive elements, in row-major order, of a named tensor. values: of any shape; start: the number of the first
    element; shape: that of the whole tensor."""

    values: Tensor
    start: int
    shape: tuple[int, ...]


def share_of(state: Mapping[str, Tensor], *, rank: int, world_size: int) -> dict[str, Piece]:
    """What one rank writes of tensors that all ranks hold: about as many bytes as the others, the same on each rank."""
    loads = [0] * world_size
    mine: dict[str, Piece] = {}
    for name, tensor in sorted(state.items(), key=lambda item: (-item[1].nbytes, item[0])):
        owner = loads.index(min(loads))
        loads[owner] += tensor.nbytes
        if owner == rank:
            mine[name] = Piece(tensor, 0, tuple(tensor.shape))
    return mine


def collect_state(trainable: Named, optimizer: Any) -> dict[str, Tensor]:
    """The state as references to the live tensors; the caller copies or writes them before the next step."""
    state: dict[str, Tensor] = {}
    for name, parameter in trainable:
        state[f"model/{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"optimizer/{name}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return state


@torch.no_grad()
def restore_state(
    trainable: Named,
    optimizer: Any,
    state: Mapping[str, Tensor],
    *,
    place: Callable[[Tensor, nn.Parameter], Tensor] = lambda value, parameter: value.to(parameter.device),
    only: str | None = None,
) -> None:
    """Writes a state back. place: puts a whole tensor where the parameter is, as it is cut. only: of the optimizer's
    tensors, those of this name.

    Raises CheckpointError when the state is of another model.
    """
    restore_weights(trainable, state, place=place)
    slots = optimizer_slots(state)
    fused = any(group.get("fused") for group in optimizer.param_groups)
    counts_on_device = getattr(optimizer, "counts_on_device", fused)

    def at_home(value: Tensor, parameter: nn.Parameter) -> Tensor:
        """Where the optimizer would have put it: counts are read on the host, but by fused kernels; what belongs to a
        parameter that rests is parked there."""
        if value.ndim:
            placed = place(value, parameter)
            return placed.clone() if parameter.requires_grad else placed.to("cpu", copy=True)
        return value.to(parameter.device if counts_on_device else "cpu", copy=True)

    for name, parameter in trainable:
        if name in slots:
            optimizer.state[parameter] = {
                slot: at_home(state[key], parameter) for slot, key in slots[name].items() if only in (None, slot)
            }


def optimizer_slots(state: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """Name of a parameter -> what the optimizer keeps for it -> its name in the state."""
    slots: dict[str, dict[str, str]] = {}
    for key in state:
        kind, _, rest = key.partition("/")
        if kind == "optimizer":
            name, _, slot = rest.rpartition("/")
            slots.setdefault(name, {})[slot] = key
    return slots


@torch.no_grad()
def restore_weights(
    trainable: Named,
    state: Mapping[str, Tensor],
    *,
    place: Callable[[Tensor, nn.Parameter], Tensor] = lambda value, parameter: value,
) -> None:
    """Writes the weights of a state back, and leaves the optimizer's part of it alone. Raises CheckpointError."""
    expected = {f"model/{name}" for name, _ in trainable}
    found = {name for name in state if name.startswith("model/")}
    if expected != found:
        odd = sorted(expected ^ found)[0].removeprefix("model/")
        raise CheckpointError("the checkpoint", f"is of another model: {odd} is only in one of them.")
    for name, parameter in trainable:
        saved = state[f"model/{name}"]
        if saved.shape != parameter.shape:
            raise CheckpointError(
                "the checkpoint", f"has {name} of shape {tuple(saved.shape)}, the model {tuple(parameter.shape)}."
            )
        parameter.copy_(place(saved, parameter))
