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
        self._wrapped: Any = None
        self._weights_agree = False

    def _ddp(self) -> Any:
        """The module with DDP's hooks, made when the first step of these parameters comes: it has buckets for what
        requires a gradient then. Gradients lie in the buckets, not beside them. The first time, rank 0's weights are
        given to all."""
        if self._wrapped is None:
            self._wrapped = DistributedDataParallel(
                self.module,
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                init_sync=not self._weights_agree,
                forward_sync_buffers=False,
                gradient_as_bucket_view=True,
            )
            self._weights_agree = True
        return self._wrapped

    def train_only(self, names: frozenset[str], *, keep_state: bool) -> None:
        """See Strategy. DDP waits for a gradient of every parameter it was made with, so it is made anew."""
        self._wrapped = None
        super().train_only(names, keep_state=keep_state)

    def loss(self, batch: Batch) -> Tensor:
        """See Strategy."""
        loss: Tensor = self._ddp()(batch)
        return loss

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """See Strategy."""
        without: AbstractContextManager[None] = self._ddp().no_sync()
        return nullcontext() if last else without

    def backward(self, loss: Tensor) -> None:
        """See Strategy. DDP averages over ranks, so the loss is multiplied by their number first."""
        (loss * self.world_size).backward()

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """See Strategy."""
        total = value.clone()
        dist.all_reduce(total)
        return total
