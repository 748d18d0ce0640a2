"""Optimizers that need whole weights, on ranks that hold ranges of them.

Each parameter has one rank that owns its optimizer state. A step brings the ranges of gradient and weight together on
that rank, which steps the whole parameter, and brings the new values back to where they came from. Nothing of it knows
how a strategy cuts: FSDP2's rows and ZeRO's flat partitions are both consecutive elements of named tensors.

Weights are gathered anew in every step. A whole copy that stays with the owner would save a third of the traffic, and
be a second truth: what restores, averages or swaps weights would have to change both.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raylm.training.averages import SLOT
from raylm.training.state import Piece, optimizer_slots
from raylm.training.strategies.base import BuildOptimizer, rest_optimizer

BUCKET_ELEMENTS = 16_000_000
"""Of parameters that one rank owns and steps at a time; a parameter with more has a bucket of its own."""


@dataclass(frozen=True, slots=True)
class Part:
    """What this rank holds of a parameter: consecutive elements of weight and gradient, flat, references to both."""

    weights: Tensor
    gradients: Tensor


def owners_of(sizes: Mapping[str, int], world_size: int) -> dict[str, int]:
    """Name -> the rank that owns it. sizes: elements, in the model's order.

    Each parameter goes to the rank with the least so far. In the model's order, not by size, the parameters of a block
    are spread over the ranks, so that LISA's few blocks are too.
    """
    loads = [0] * world_size
    owners = {}
    for name, size in sizes.items():
        owner = loads.index(min(loads))
        loads[owner] += size
        owners[name] = owner
    return owners


class OwnedOptimizer:
    """The optimizer of the parameters that this rank owns. All methods but `pieces` and `load` are called by all ranks,
    with the same names."""

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        build_optimizer: BuildOptimizer,
        *,
        place: torch.device,
        device: torch.device,
    ) -> None:
        """shapes: of whole parameters, in the model's order. place: where state lies and steps are taken; device: what
        collectives run on."""
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._shapes, self._place, self._device = shapes, place, device
        self._owners = owners_of({name: shape.numel() for name, shape in shapes.items()}, self._world_size)
        # Of all names, so that groups are the same on all ranks; what others own never has a gradient here.
        self._empty = torch.zeros(1, device=place)
        self._parameters = {name: nn.Parameter(self._empty.expand(shape)) for name, shape in shapes.items()}
        self._optimizer = build_optimizer(list(self._parameters.items()))
        self._own = [(name, p) for name, p in self._parameters.items() if self._owners[name] == self._rank]
        self._ranges: list[dict[str, tuple[int, int]]] = []

    def lay_out(self, ranges: Mapping[str, tuple[int, int]]) -> None:
        """Tells all ranks what each holds. ranges: number of the first element, and how many, of each parameter that
        steps; of those without elements here too."""
        found: list[Any] = [None] * self._world_size
        dist.all_gather_object(found, dict(ranges))
        self._ranges = found
        for name in ranges:
            held = sum(part[name][1] for part in found)
            assert held == self._shapes[name].numel(), f"{name}: the ranks hold {held} elements"

    def step(self, parts: Mapping[str, Part], rates: Sequence[float]) -> None:
        """One step of these parameters, which changes the parts' weights. rates: one for each of the groups."""
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for bucket in self._buckets(parts):
            self._gather(bucket, parts)
            self._optimizer.step()
            self._scatter(bucket, parts)

    def estimate(self, parts: Mapping[str, Part], num_labels: int) -> None:
        """Takes the gradients as an estimate of the curvature (Sophia); no weight changes."""
        for bucket in self._buckets(parts):
            self._gather(bucket, parts)
            update: Callable[[int], None] = self._optimizer.update_hessian
            update(num_labels)
            self._let_go(bucket)

    def rest(self, names: frozenset[str], *, keep_state: bool) -> None:
        """From now on these are trained; the state of the others is parked in host memory or freed."""
        for name, parameter in self._own:
            parameter.requires_grad_(name in names)
        rest_optimizer(self._optimizer, self._own, keep_state=keep_state)

    def pieces(self) -> dict[str, Piece]:
        """The whole tensors of state that this rank owns (training/state.py)."""
        found = {}
        for name, parameter in self._own:
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensor = value if isinstance(value, Tensor) else torch.tensor(value)
                found[f"optimizer/{name}/{key}"] = Piece(tensor, 0, tuple(tensor.shape))
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes what this rank owns from a state of whole tensors. Averages of weights are not the optimizer's."""
        slots = optimizer_slots(state)
        for name, parameter in self._own:
            if name in slots:
                self._optimizer.state[parameter] = {
                    slot: state[key].to(self._place, copy=True) for slot, key in slots[name].items() if slot != SLOT
                }

    @property
    def num_groups(self) -> int:
        """Groups of the optimizer, the same on all ranks."""
        return len(self._optimizer.param_groups)

    def num_elements(self) -> int:
        """Elements of the state on this rank."""
        slots = [slots for _, p in self._own for slots in self._optimizer.state.get(p, {}).values()]
        return sum(value.numel() for value in slots if isinstance(value, Tensor) and value.ndim)

    def _buckets(self, parts: Mapping[str, Part]) -> list[list[str]]:
        buckets: list[list[str]] = [[]]
        loads = [0] * self._world_size
        for name in (name for name in self._shapes if name in parts):
            owner, size = self._owners[name], self._shapes[name].numel()
            if loads[owner] and loads[owner] + size > BUCKET_ELEMENTS:
                buckets.append([])
                loads = [0] * self._world_size
            buckets[-1].append(name)
            loads[owner] += size
        return buckets if buckets[0] else []

    def _owned_by(self, rank: int, bucket: Sequence[str]) -> list[str]:
        return [name for name in bucket if self._owners[name] == rank]

    def _gather(self, bucket: Sequence[str], parts: Mapping[str, Part]) -> None:
        """Gives this rank's parameters of a bucket their whole weights and gradients."""
        sent = [
            [flat for name in self._owned_by(rank, bucket) for flat in (parts[name].weights, parts[name].gradients)]
            for rank in range(self._world_size)
        ]
        mine = self._owned_by(self._rank, bucket)
        lengths = [2 * sum(ranges[name][1] for name in mine) for ranges in self._ranges]
        # Apart, so that both begin where allocations do: products of unaligned memory are rounded otherwise.
        whole = {name: [torch.empty(self._shapes[name].numel(), device=self._place) for _ in range(2)] for name in mine}
        for ranges, received in zip(self._ranges, self._exchange(sent, lengths), strict=True):
            place = 0
            for name in mine:
                start, length = ranges[name]
                for values in whole[name]:
                    values[start : start + length] = received[place : place + length]
                    place += length
        for name, (weights, gradients) in whole.items():
            parameter, shape = self._parameters[name], self._shapes[name]
            parameter.data = weights.view(shape)
            parameter.grad = gradients.view(shape)

    def _scatter(self, bucket: Sequence[str], parts: Mapping[str, Part]) -> None:
        """Sends the new weights back into the parts."""
        mine = self._owned_by(self._rank, bucket)
        new = {name: self._parameters[name].detach().view(-1) for name in mine}
        sent = [[new[name].narrow(0, *ranges[name]) for name in mine if ranges[name][1]] for ranges in self._ranges]
        own = self._ranges[self._rank]
        lengths = [sum(own[name][1] for name in self._owned_by(rank, bucket)) for rank in range(self._world_size)]
        for rank, received in enumerate(self._exchange(sent, lengths)):
            place = 0
            for name in self._owned_by(rank, bucket):
                length = own[name][1]
                parts[name].weights.copy_(received[place : place + length])
                place += length
        self._let_go(bucket)

    def _let_go(self, bucket: Sequence[str]) -> None:
        for name in self._owned_by(self._rank, bucket):
            parameter = self._parameters[name]
            parameter.grad = None
            parameter.data = self._empty.expand(self._shapes[name])

    def _exchange(self, sent: Sequence[Sequence[Tensor]], lengths: Sequence[int]) -> Sequence[Tensor]:
        """Sends each rank some tensors, one after the other; returns what each has sent here, of these lengths."""
        sizes = [sum(flat.numel() for flat in flats) for flats in sent]
        flats = [flat.to(self._device) for flats in sent for flat in flats]
        outgoing = torch.cat(flats) if flats else torch.empty(0, device=self._device)
        received = torch.empty(sum(lengths), device=self._device)
        dist.all_to_all_single(received, outgoing, list(lengths), sizes)
        return received.to(self._place).split(list(lengths))


def part_of(weights: Tensor, gradients: Tensor) -> Part:
    """A part by its tensors, which lie in one stretch of memory."""
    return Part(weights.detach().view(-1), gradients.detach().reshape(-1))
