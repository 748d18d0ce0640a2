"""Every rank holds a part of each weight, gradient and optimizer state (torch FSDP2, `fully_shard`).

A decoder block is gathered when its turn comes and given up after it; embedding, final norm and output layer stay
gathered from forward to backward. Gradients go back to their owners after every micro-batch, not only after the last:
more traffic than holding whole ones, but whole gradients are what one shards for.
"""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from raylm.config.training import FsdpSection
from raylm.errors import ConfigError
from raylm.models.blocks import decoder_blocks
from raylm.training.averages import SLOT
from raylm.training.batch import Batch
from raylm.training.module import LossModule
from raylm.training.state import Piece, collect_state, restore_state
from raylm.training.strategies.base import BuildOptimizer, rest_optimizer, take_finite_estimate
from raylm.training.strategies.owned import OwnedOptimizer, part_of


class FsdpStrategy:
    """Needs an initialised process group (gloo on CPUs, nccl on GPUs)."""

    holds_whole_weights = False

    def __init__(
        self, module: LossModule, build_optimizer: BuildOptimizer, device: torch.device, section: FsdpSection
    ) -> None:
        """Shards the module in place. Raises ConfigError for offloading without a GPU."""
        if section.cpu_offload and device.type == "cpu":
            raise ConfigError("fsdp.cpu_offload", "the weights are on the CPU already.", "Drop it.")
        self.module, self.device = module, device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._mesh = init_device_mesh(device.type, (self.world_size,))
        offload = CPUOffloadPolicy() if section.cpu_offload else OffloadPolicy()
        for block in decoder_blocks(module.model):
            fully_shard(
                block, mesh=self._mesh, offload_policy=offload, reshard_after_forward=section.reshard_after_forward
            )
        fully_shard(module, mesh=self._mesh, offload_policy=offload)
        for part in module.modules():
            if isinstance(part, FSDPModule):  # sums, not means; gloo has no mean to offer anyway
                part.set_force_sum_reduction_for_comms(True)
                part.set_gradient_divide_factor(1.0)
        self.optimizer: Any = build_optimizer(module.trainable())
        self._owned: OwnedOptimizer | None = None
        if self.optimizer.takes_whole:  # then `optimizer` has rates, gradients and averages only
            named = module.trainable()
            place = torch.device("cpu") if section.cpu_offload else device
            self._owned = OwnedOptimizer(
                {name: parameter.shape for name, parameter in named}, build_optimizer, place=place, device=device
            )
            self._owned.lay_out({name: (self._start(p), p.to_local().numel()) for name, p in named})

    def loss(self, batch: Batch) -> Tensor:
        """See Strategy."""
        loss: Tensor = self.module(batch)
        if not torch.is_grad_enabled():
            # No backward comes that would give up embedding, norm and output layer: gathered, they are other parameters
            # than those that the optimizer knows.
            self.module.reshard()
        return loss

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """See Strategy."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """See Strategy."""
        loss.backward()

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """See Strategy."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def optimizer_step(self) -> None:
        """See Strategy."""
        if self._owned:
            parts = {
                name: part_of(parameter.to_local(), parameter.grad.to_local())
                for name, parameter in self.module.trainable()
                if parameter.grad is not None
            }
            self._owned.step(parts, [group["lr"] for group in self.optimizer.param_groups])
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def take_estimate(self, num_labels: int) -> None:
        """See Strategy."""
        take_finite_estimate(self, num_labels)

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """See Strategy."""
        total = value.clone()
        dist.all_reduce(total)
        return total

    def train_only(self, names: frozenset[str], *, keep_state: bool) -> None:
        """See Strategy. FSDP has two parameters of each name, gathered and sharded: both learn of it."""
        parts = [part for part in self.module.modules() if isinstance(part, FSDPModule)]
        for part in parts:  # one after the other: all gathered at once would be the whole model
            part.unshard()
            self._require(names)
            part.reshard()
        self._require(names)
        rest_optimizer(self.optimizer, self.module.trainable(), keep_state=keep_state)
        if self._owned:
            self._owned.rest(names, keep_state=keep_state)

    def _require(self, names: frozenset[str]) -> None:
        for name, parameter in self.module.trainable():
            parameter.requires_grad_(name in names)

    def pieces(self) -> dict[str, Piece]:
        """See Strategy. A parameter is cut by rows; what is not is taken from rank 0."""
        found: dict[str, Piece] = self._owned.pieces() if self._owned else {}
        for name, tensor in collect_state(self.module.trainable(), self.optimizer).items():
            shape, start = tuple(tensor.shape), 0
            if isinstance(tensor, DTensor) and tensor.placements[0] == Shard(0):
                tensor, start = tensor.to_local(), self._start(tensor)
            else:
                tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                if self.rank:
                    continue
            if tensor.numel():
                found[name] = Piece(tensor, start, shape)
        return found

    def _start(self, tensor: Any) -> int:
        """The number of the first element that this rank holds of a tensor cut by rows."""
        _, (first, *_) = compute_local_shape_and_global_offset(tensor.shape, self._mesh, tensor.placements)
        return min(first * math.prod(tensor.shape[1:]), tensor.numel())

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See Strategy."""
        only = SLOT if self._owned else None
        restore_state(self.module.trainable(), self.optimizer, state, place=self._sharded, only=only)
        if self._owned:
            self._owned.load(state)

    def _sharded(self, value: Tensor, parameter: Any) -> Tensor:
        """This rank's part of a whole tensor: cut as the parameter is, or held whole where it has another shape."""
        if value.ndim == 0:
            return value.to(parameter.device)
        placements = parameter.placements if value.shape == parameter.shape else [Replicate()]
        # distribute_tensor moves to the mesh's device; what is offloaded lies in host memory.
        return distribute_tensor(value, self._mesh, placements, src_data_rank=None).to(parameter.device)
