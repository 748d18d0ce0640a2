"""Every rank holds the whole model; gradients are summed over ranks (torch DistributedDataParallel)."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from raylm.training.batch import Batch
from raylm.training.module import LossModule
from raylm.training.strategies.base import BuildOptimizer, WholeState


class DdpStrategy(WholeState):
    """Needs an initialised process group (gloo on CPUs, nccl on GPUs)."""

    def __init__(
        self, module: LossModule, build_optimizer: BuildOptimizer, device: torch.device, section: None = None
    ) -> None:
        self.module, self.device = module, device
        self.optimizer = build_optimizer(module.trainable())
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._wrapped: Any = self._wrap(init_sync=True)

    def _wrap(self, *, init_sync: bool) -> Any:
        """init_sync: rank 0's weights for all."""
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(self.module, device_ids=devices, init_sync=init_sync)

    def train_only(self, names: frozenset[str], *, keep_state: bool) -> None:
        """See Strategy. DDP waits for a gradient of every parameter it was made with, so it is made anew."""
        super().train_only(names, keep_state=keep_state)
        self._wrapped = self._wrap(init_sync=False)

    def loss(self, batch: Batch) -> Tensor:
        """See Strategy."""
        return self._wrapped(batch)

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """See Strategy."""
        return nullcontext() if last else self._wrapped.no_sync()

    def backward(self, loss: Tensor) -> None:
        """See Strategy. DDP averages over ranks, so the loss is multiplied by their number first."""
        (loss * self.world_size).backward()

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """See Strategy."""
        total = value.clone()
        dist.all_reduce(total)
        return total
