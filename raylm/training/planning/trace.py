"""Bytes of tensors that are alive during a micro-batch, counted without computing.

The module that is trained runs forward and backward on meta tensors, which have shapes but no memory, and every storage
that an operator makes is counted from its making to its last use. No formula of a block's activations is needed, so any
architecture, method and gradient checkpointing is counted as it is. What a kernel allocates for itself is not seen.
"""

import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raylm.models.adapters import base_of, output_layer
from raylm.training.batch import Batch
from raylm.training.module import LossModule

META = torch.device("meta")
_PRODUCTS = {
    torch.nn.functional.linear,
    torch.nn.functional.scaled_dot_product_attention,
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.bmm,
    torch.addmm,
}


@dataclass(frozen=True, slots=True)
class Traced:
    """Bytes beside the weights.

    activations: saved for the backward pass when the decoder is done; loss: the most on top of them while the loss is
    computed, its gradient of the output layer included; peak: the most at any time, gradients included.
    """

    activations: int
    loss: int
    peak: int


def trace_micro_batch(
    module: LossModule,
    *,
    tokens: int,
    loss_tokens: int,
    sequences: int,
    precision: str,
    accumulated: bool,
    scattered: Collection[nn.Parameter] = (),
) -> Traced:
    """Counts one forward and backward pass of a module on the meta device.

    tokens, loss_tokens: of the micro-batch, in `sequences` sequences. accumulated: gradients of a former micro-batch
    are there already. scattered: parameters whose gradients leave this rank as soon as they are complete.
    """
    live = _Live([*module.parameters(), *module.buffers()])
    trainable = [p for p in module.parameters() if p.requires_grad]
    gone = {id(parameter) for parameter in scattered}
    for parameter in trainable:
        parameter.grad = torch.empty_like(parameter) if accumulated and id(parameter) not in gone else None
        if parameter.grad is not None:
            live.count(parameter.grad)
    hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in trainable if id(p) in gone]
    causal = base_of(module.model)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    module.train()
    batch = _batch(tokens, sequences, loss_tokens)
    try:
        with _Operators(loss_tokens, dtype), live:
            hidden = module.hidden(causal, batch)
            activations, in_forward, live.peak = live.now, live.peak, live.now
            loss = module.loss_of(hidden, *output_layer(causal), batch.labels, dtype)
            in_loss, live.peak = live.peak, max(live.peak, in_forward)
            del hidden
            _backward(loss)
            del loss
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trainable:
            parameter.grad = None
    return Traced(activations, in_loss - activations, live.peak)


class _Live(TorchDispatchMode):
    """Bytes of the storages that operators have made and that are still alive; known ones do not count."""

    def __init__(self, known: Collection[Tensor]) -> None:
        super().__init__()
        self._seen: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = True
        self.now = self.peak = 0

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen[storage] = True
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.device == META:
                self.count(leaf)
        return made


class _Operators(TorchFunctionMode):
    """What meta tensors lack: attention has the memory of the fused kernels (PyTorch would take the one that keeps a
    probability for each pair), products are in the dtype that autocast gives them, and labels have their number.
    """

    def __init__(self, loss_tokens: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._loss_tokens, self._dtype = loss_tokens, dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.nonzero and args[0].device == META:
            return torch.empty(self._loss_tokens, 1, dtype=torch.int64, device=META)
        if func in _PRODUCTS and self._dtype != torch.float32:
            args = tuple(self._in_dtype(value) for value in args)
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        return func(*args, **(kwargs or {}))

    def _in_dtype(self, value: Any) -> Any:
        return value.to(self._dtype) if isinstance(value, Tensor) and value.dtype == torch.float32 else value


class _Attention(torch.autograd.Function):
    """What fused attention keeps: its inputs, its output, and one number for each head and query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:3], value.shape[-1])
        normaliser = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, output, normaliser)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _backward(loss: Tensor) -> None:
    """loss.backward() that stays in the function mode, which checkpointed blocks need when they are computed again:
    PyTorch leaves the mode for functions that the mode could override."""
    engine = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _drop_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None


def _batch(tokens: int, sequences: int, loss_tokens: int) -> Batch:
    row: Callable[..., Tensor] = lambda *shape: torch.empty(*shape, dtype=torch.int64, device=META)  # noqa: E731
    lengths = torch.full((sequences,), tokens // sequences)
    lengths[-1] += tokens - int(lengths.sum())
    return Batch(row(1, tokens), row(1, tokens), row(tokens), lengths, loss_tokens)
