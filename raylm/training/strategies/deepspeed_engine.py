"""What DeepSpeed needs around an engine: a module, an optimizer, a process group, and less memory."""

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raylm.training.batch import Batch
from raylm.training.module import LossModule


class Wrapped(nn.Module):
    """What DeepSpeed hangs its engine on; every engine has its own. Brings the caller's autocast with it."""

    def __init__(self, module: LossModule) -> None:
        super().__init__()
        self.loss = module

    def forward(self, batch: Batch, dtype: torch.dtype | None) -> Tensor:
        with torch.autocast(batch.input_ids.device.type, dtype, cache_enabled=False) if dtype else nullcontext():
            loss: Tensor = self.loss(batch)
        return loss


def step_in_place(zero: Any) -> None:
    """Frees ZeRO-3's second copy of fp32 weights, but for an offloaded optimizer, which needs its own.

    DeepSpeed 0.19.8 means to make none, and does, because it compares a device with the name of one.
    """
    for master, flat in zip(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True):
        if not zero.offload_optimizer and master.device == flat.device:
            master.data = flat.data


def deepspeed_on(device: torch.device) -> Any:
    """DeepSpeed on the process group there is."""
    os.environ["LOCAL_RANK"] = str(device.index or 0)  # which DeepSpeed makes the current device
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when it is imported
    # What it calls of torch is deprecated since 2.13; drop this with the first release that calls the new names.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning, module="torch")
    import deepspeed

    if not deepspeed.comm.is_initialized():
        # Its own collectives in shared memory serve inference only, and would be compiled here, with g++ and ninja.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        with contextlib.redirect_stdout(io.StringIO()):
            deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False)
    return deepspeed


class HandedOn(torch.optim.Optimizer):
    """What DeepSpeed steps: gives the flat tensors that have gradients to a function."""

    def __init__(self, groups: Sequence[Mapping[str, Any]], take: Callable[[list[Tensor]], None]) -> None:
        super().__init__([dict(group) for group in groups], {"lr": 0.0})
        self._take = take

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step."""
        self._take([flat for group in self.param_groups for flat in group["params"] if flat.grad is not None])
