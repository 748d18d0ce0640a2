"""The next-token loss: only the positions that carry loss reach the output layer."""

from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100


def next_token_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    chunk_tokens: int = 1024,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Summed cross-entropy in nats over the positions that carry loss; the caller divides by the global count.

    hidden: (tokens, hidden_size), already aligned with labels; weight: (vocab_size, hidden_size); bias: (vocab_size,).
    labels: (tokens,) int64, IGNORE_INDEX where there is no loss. Gradients are computed together with the loss,
    chunk_tokens positions at a time: no logits are kept, and peak memory is chunk_tokens x vocab_size x 8 bytes.
    label_smoothing: share of each target that is spread evenly over the vocabulary (arXiv:1512.00567, section 7).
    z_loss: times the squared log of the softmax's normaliser is added to each position's loss (arXiv:2204.02311,
    section 5). dtype: of the products; default: autocast's, or that of hidden. Loss and softmax are fp32. Returns a 0-d
    fp32 tensor; 0, with a gradient, when nothing carries loss.
    """
    carries = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    device = hidden.device.type
    if dtype is None:
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    options = (torch.is_grad_enabled(), chunk_tokens, dtype, label_smoothing, z_loss)
    loss: Tensor = _FusedLoss.apply(hidden.index_select(0, carries), weight, bias, labels[carries], *options)
    return loss


@torch.no_grad()
def drawn_labels(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, uniforms: Tensor, *, chunk_tokens: int = 1024
) -> Tensor:
    """Labels drawn from the model's distribution where there are labels, by the inverse of its cumulated softmax.

    Arguments and shapes as in next_token_loss. uniforms: (tokens,) fp32 within 0 and 1, one draw a position.
    """
    carries = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    states, head, drawn = hidden.index_select(0, carries).to(dtype), weight.to(dtype), labels.clone()
    for start in range(0, len(carries), chunk_tokens):
        places = carries[start : start + chunk_tokens]
        logits = (states[start : start + chunk_tokens] @ head.t()).float()
        if bias is not None:
            logits += bias
        cumulated = logits.softmax(-1).cumsum(-1)
        wanted = uniforms[places, None] * cumulated[:, -1:]
        found = torch.searchsorted(cumulated, wanted, right=True).squeeze(1)
        drawn[places] = found.clamp_(max=weight.shape[0] - 1)
    return drawn


class _FusedLoss(torch.autograd.Function):
    """Loss and gradients in one pass: d(logits) = softmax - target needs nothing that the backward pass brings."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        differentiated: bool,
        chunk: int,
        dtype: torch.dtype,
        smoothing: float,
        z_loss: float,
    ) -> Tensor:
        # Under no_grad, needs_input_grad says yes for whatever requires a gradient.
        need_hidden, need_weight, need_bias = (need and differentiated for need in ctx.needs_input_grad[:3])
        states, head = hidden.to(dtype), weight.to(dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(states) if need_hidden else None
        blank = torch.empty_like if dtype == torch.float32 and len(labels) else torch.zeros_like
        grad_weight = blank(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias and bias is not None else None
        for start in range(0, len(labels), chunk):
            part, target = states[start : start + chunk], labels[start : start + chunk, None]
            logits = (part @ head.t()).float()
            if bias is not None:
                logits += bias
            log_probs = torch.log_softmax(logits, dim=-1)
            of_target = log_probs.gather(1, target)
            normaliser = logits.gather(1, target) - of_target
            del logits
            loss -= (1 - smoothing) * of_target.sum()
            if smoothing:
                loss -= smoothing * log_probs.mean(-1).sum()
            if z_loss:
                loss += z_loss * normaliser.square().sum()
            if not (need_hidden or need_weight or need_bias):
                continue
            delta = log_probs.exp_()
            if z_loss:
                delta *= 1 + 2 * z_loss * normaliser
            if smoothing:
                delta -= smoothing / delta.shape[1]
            delta.scatter_add_(1, target, delta.new_full((1, 1), smoothing - 1.0).expand(len(target), 1))
            if grad_bias is not None:
                grad_bias += delta.sum(0)
            delta = delta.to(dtype)
            if grad_hidden is not None:
                torch.mm(delta, head, out=grad_hidden[start : start + chunk])
            if grad_weight is not None:
                if dtype == torch.float32:  # beta=0: what stands there is not read
                    grad_weight.addmm_(delta.t(), part, beta=float(start > 0))
                else:
                    grad_weight += delta.t() @ part
        ctx.grads = (
            grad_hidden.to(hidden.dtype) if grad_hidden is not None else None,
            grad_weight.to(weight.dtype) if grad_weight is not None else None,
            grad_bias,
        )
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grads = tuple(None if grad is None else grad.mul_(grad_output) for grad in ctx.grads)
        ctx.grads = None
        return (*grads, None, None, None, None, None, None)
