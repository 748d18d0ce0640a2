"""One process holds everything."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from raylm.training.batch import Batch
from raylm.training.module import LossModule
from raylm.training.strategies.base import BuildOptimizer, WholeState


class SingleStrategy(WholeState):
    """The plain step that every other strategy must agree with."""

    rank = 0
    world_size = 1

    def __init__(
        self, module: LossModule, build_optimizer: BuildOptimizer, device: torch.device, section: None = None
    ) -> None:
        self.module, self.device = module, device
        self.optimizer = build_optimizer(module.trainable())

    def loss(self, batch: Batch) -> Tensor:
        """See Strategy."""
        return self.module(batch)

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """See Strategy."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """See Strategy."""
        loss.backward()

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """See Strategy."""
        return value
