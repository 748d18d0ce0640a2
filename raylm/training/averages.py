"""Averages of the weights, which evaluation and export use in their place.

They lie with the optimizer's state of each parameter: they are cut among ranks, saved, resharded and put back as that
is.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from raylm.training.strategies.base import Strategy

SLOT = "ema"
"""Name of the average among the optimizer's tensors of a parameter."""
ITERATE = "z"
"""Name of a schedule-free optimizer's own iterate there."""


class Averages(Protocol):
    """Weights to use instead of those that are trained."""

    def update(self) -> None:
        """After a step."""
        ...

    def in_place(self) -> AbstractContextManager[None]:
        """The averages are the weights for the length of the block. Called by all ranks."""
        ...


class Ema:
    """Exponential moving averages (arXiv:1412.6980, 7.2).

    After a step they are decay x average + (1 - decay) x weights, from the weights before the first step on.
    """

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


class ScheduleFree:
    """The averages x of a schedule-free optimizer (arXiv:2405.15682).

    It trains y = beta x + (1 - beta) z and keeps z.
    """

    def __init__(self, strategy: Strategy, beta: float) -> None:
        self._strategy, self._beta = strategy, beta

    def update(self) -> None:
        """See Averages. The optimizer has done it."""

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """See Averages. The weights are kept, in host memory: computed back, training would go on with other bits."""
        kept = []
        with torch.no_grad():
            for _, parameter in self._strategy.module.trainable():
                iterate = self._strategy.optimizer.state.get(parameter, {}).get(ITERATE)
                if iterate is not None:
                    kept.append((parameter, parameter.detach().to("cpu", copy=True)))
                    parameter.copy_(_averaged(parameter, iterate, self._beta))
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, weights in kept:
                    parameter.copy_(weights)


def _averaged(weights: Tensor, iterate: Tensor, beta: float) -> Tensor:
    return weights.detach().lerp(iterate, 1.0 - 1.0 / beta)


class AveragedState(Mapping[str, Tensor]):
    """A state with each weight's average in its place, where it has one."""

    def __init__(self, state: Mapping[str, Tensor], *, beta: float | None = None) -> None:
        """beta: of a schedule-free optimizer."""
        self._state, self._beta = state, beta

    def __getitem__(self, name: str) -> Tensor:
        iterate = f"optimizer/{name.removeprefix('model/')}/{ITERATE}"
        if self._beta is not None and name.startswith("model/") and iterate in self._state:
            return _averaged(self._state[name], self._state[iterate], self._beta)
        average = f"optimizer/{name.removeprefix('model/')}/{SLOT}"
        return self._state[average if name.startswith("model/") and average in self._state else name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)
