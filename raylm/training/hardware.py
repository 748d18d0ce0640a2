"""What the processor can do: which precision is native, how fast its matrix products are, how much memory is used."""

import ctypes
import time
from contextlib import AbstractContextManager, nullcontext

import torch

from raylm.errors import ConfigError
from raylm.models.processor import has_native_bf16
from raylm.models.quantize import num_elements

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""The type in which each precision multiplies."""


def resolve_precision(name: str, device: torch.device, *, loss_scaling: bool = True) -> str:
    """`training.precision` with auto resolved: bf16 where the processor multiplies it natively, else fp16 on a GPU with
    a strategy that does loss scaling, else fp32.

    Raises ConfigError for fp16 on a CPU.
    """
    if name == "fp16":
        check_fp16(on_gpu=device.type == "cuda")
    if name != "auto":
        return name
    if has_native_bf16(device):
        return "bf16"
    return "fp16" if device.type == "cuda" and loss_scaling else "fp32"


def check_fp16(*, on_gpu: bool) -> None:
    """Raises ConfigError for fp16 steps on a CPU."""
    if not on_gpu:
        raise ConfigError(
            "training.precision",
            "fp16 is for GPUs: CPUs multiply it slowly, and bf16 or fp32 need no loss scaling.",
            "Set training.precision=auto.",
        )


@torch.no_grad()
def matmul_peak_flops(precision: str, device: torch.device, *, size: int = 1024, repeats: int = 5) -> float:
    """Floating-point operations per second of a square matrix product, best of some: the peak that MFU refers to."""
    dtype = DTYPES[precision]
    size = size if device.type == "cpu" else 8192
    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats + 1):
        _wait(device)
        started = time.perf_counter()
        torch.mm(one, other)
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next step instead of giving each large tensor back to the kernel.

    A step on a CPU allocates the same activations and gradients again and again, and faulting fresh pages in costs
    about a tenth of it. No effect where the C library has no mallopt.
    """
    arena_max, mmap_max, trim_threshold = -8, -4, -1  # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((arena_max, 1), (mmap_max, 0), (trim_threshold, -1)):
            mallopt(parameter, value)


Matrices = list[tuple[torch.nn.Parameter, int]]


def matrices(module: torch.nn.Module) -> Matrices:
    """The matrices of a module and their elements, embedding and output layer once when tied. Before a strategy has cut
    them up: sharded ones do not tell."""
    return [(parameter, num_elements(parameter)) for parameter in module.parameters() if parameter.ndim >= 2]


def matrix_parameters(module: torch.nn.Module) -> int:
    """Elements of all matrices."""
    return sum(elements for _, elements in matrices(module))


def flops_per_token(found: Matrices) -> int:
    """Floating-point operations of a forward and backward pass by the usual rule: 2 for each element of a matrix
    forward, 2 for the gradient of its input, 2 for its own gradient where it learns now. Attention's products of tokens
    with tokens, and what gradient checkpointing computes again, are not counted."""
    return sum(elements * (6 if parameter.requires_grad else 4) for parameter, elements in found)


def memory_gib(device: torch.device) -> dict[str, float]:
    """Memory of this process in GiB: resident on the host; on a GPU what tensors take now and took at most since the
    last call, and what the allocator has reserved."""
    import psutil

    figures = {"host_gib": psutil.Process().memory_info().rss / 2**30}
    if device.type == "cuda":
        figures["device_allocated_gib"] = torch.cuda.memory_allocated(device) / 2**30
        figures["device_peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        figures["device_reserved_gib"] = torch.cuda.memory_reserved(device) / 2**30
        torch.cuda.reset_peak_memory_stats(device)
    return figures


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """The autocast context of a precision; none for fp32.

    Without autocast's cache: it would keep a copy of every trainable weight in that type until the end of the forward
    pass, of gathered ones too. A weight is used once in a pass, so there is nothing to win by it.
    """
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision], cache_enabled=False)
