"""An exponential moving average of the weights, which evaluation and export use in their place (arXiv:1412.6980, 7.2).

The averages lie with the optimizer's state of each parameter: they are cut among ranks, saved, resharded and put back
as that is. After a step they are decay x average + (1 - decay) x weights, from the weights before the first step on.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from raylm.training.strategies.base import Strategy

SLOT = "ema"
"""Name of the average among the optimizer's tensors of a parameter."""


class Ema:
    """The averages of what a strategy trains."""

    def __init__(self, strategy: Strategy, decay: float) -> None:
        """decay: the share of the average that a step keeps, within 0 and 1."""
        self._strategy, self._decay = strategy, decay
        # Not in the optimizer's state yet: optimizers make their own when there is none.
        self._first = [parameter.detach().clone() for parameter in self._parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """After a step."""
        state = self._strategy.optimizer.state
        for number, parameter in enumerate(self._parameters()):
            if SLOT not in state[parameter]:
                state[parameter][SLOT] = self._first[number]
            state[parameter][SLOT].lerp_(parameter.detach(), 1.0 - self._decay)
        self._first = []

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The averages are the weights for the length of the block. Called by all ranks."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter in self._parameters():
            average = self._strategy.optimizer.state[parameter].get(SLOT)
            if average is not None:
                weights = parameter.detach().clone()
                parameter.copy_(average)
                average.copy_(weights)

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for _, parameter in self._strategy.module.trainable()]


class AveragedState(Mapping[str, Tensor]):
    """A state with each weight's average in its place, where it has one."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state

    def __getitem__(self, name: str) -> Tensor:
        average = f"optimizer/{name.removeprefix('model/')}/{SLOT}"
        return self._state[average if name.startswith("model/") and average in self._state else name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)
