"""What a training step needs from the way ranks share the work."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from raylm.training.batch import Batch
from raylm.training.module import LossModule
from raylm.training.state import Piece, collect_state, restore_state, share_of

BuildOptimizer = Callable[[Sequence[tuple[str, nn.Parameter]]], torch.optim.Optimizer]
"""Makes an optimizer over named parameters, once they are what the strategy trains."""


class Strategy(Protocol):
    """One implementation a file. Gradients of a step are those of the summed loss over all ranks."""

    holds_whole_weights: bool
    """Each rank has the whole model in `module` and can run it alone; False where a forward is a joint act."""

    rank: int
    world_size: int
    device: torch.device
    module: LossModule
    optimizer: torch.optim.Optimizer

    def loss(self, batch: Batch) -> Tensor:
        """The summed loss of a micro-batch, through whatever wraps the module."""
        ...

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """Stands around forward and backward; gradients are exchanged with the last micro-batch only."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds the loss's gradients to those of the step."""
        ...

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Scales the step's gradients to a global norm of at most max_norm; returns the norm before, 0-d."""
        ...

    def optimizer_step(self) -> None:
        """Updates the weights and drops the gradients."""
        ...

    def take_estimate(self, num_labels: int) -> None:
        """Gives the gradients, those of the mean loss over labels that were drawn, to the optimizer as an estimate of
        the curvature, unless they are not finite, and drops them. No weight changes."""
        ...

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """The sum of every rank's value."""
        ...

    def train_only(self, names: frozenset[str], *, keep_state: bool) -> None:
        """From now on trains these of the module's trainable parameters; the others keep every bit.

        keep_state: park the optimizer state of the others in host memory; else it is freed. Called by all ranks.
        """
        ...

    def pieces(self) -> dict[str, Piece]:
        """This rank's pieces of trainable weights and optimizer state (training/state.py); of what several ranks hold,
        one rank has it. References to what the next step changes. Called by all ranks."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Puts back a state, whole tensors by name, which may be read as they are asked for."""
        ...


def rest_optimizer(optimizer: Any, trainable: Sequence[tuple[str, nn.Parameter]], *, keep_state: bool) -> None:
    """Frees or parks what an optimizer holds for parameters that are frozen, and fetches what it parked for the others.

    Optimizers pass over parameters without a gradient, so parked state is not touched.
    """
    for _, parameter in trainable:
        if parameter.requires_grad:
            place = parameter.device
        else:
            parameter.grad, place = None, torch.device("cpu")
            if not keep_state:
                optimizer.state.pop(parameter, None)
        slots = optimizer.state.get(parameter)
        if keep_state and slots:
            optimizer.state[parameter] = {
                key: value.to(place) if isinstance(value, Tensor) and value.ndim else value
                for key, value in slots.items()
            }


def take_finite_estimate(strategy: Strategy, num_labels: int) -> None:
    """`take_estimate` where gradients lie with the optimizer's parameters."""
    optimizer: Any = strategy.optimizer
    if math.isfinite(float(strategy.clip_grad_norm(math.inf))):
        optimizer.update_hessian(num_labels)
    optimizer.zero_grad(set_to_none=True)


class WholeState:
    """The parts that strategies with whole parameters on each rank have in common."""

    holds_whole_weights = True

    rank: int
    world_size: int
    module: LossModule
    optimizer: Any

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """See Strategy."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    def optimizer_step(self) -> None:
        """See Strategy."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def take_estimate(self, num_labels: int) -> None:
        """See Strategy."""
        take_finite_estimate(self, num_labels)  # type: ignore[arg-type]  # a part of one

    def train_only(self, names: frozenset[str], *, keep_state: bool) -> None:
        """See Strategy."""
        for name, parameter in self.module.trainable():
            parameter.requires_grad_(name in names)
        rest_optimizer(self.optimizer, self.module.trainable(), keep_state=keep_state)

    def pieces(self) -> dict[str, Piece]:
        """See Strategy."""
        state = collect_state(self.module.trainable(), self.optimizer)
        return share_of(state, rank=self.rank, world_size=self.world_size)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See Strategy."""
        restore_state(self.module.trainable(), self.optimizer, state)
