"""Muon for the matrices inside decoder blocks, AdamW for the rest: embedding, output layer, norms, biases.

torch.optim's Muon orthogonalises in bfloat16, as its author does. A CPU that has no products of bfloat16 takes several
times as long for them as for those of fp32, so there the weight's own precision is used. Momentum is an average, not a
sum, as in torch.optim: only the scale differs, which the orthogonalisation takes out, but for its eps.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from raylm.optim.hidden import HiddenApart
from raylm.optim.valid import check_choice, check_counts

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_EPS = 1e-7


class MuonWithAdamW(HiddenApart):
    """Matrices take Muon (arXiv:2502.16982, with the rate scaled to AdamW's)."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        """momentum … adjust_lr_fn: Muon's; betas, eps: AdamW's. Raises ValueError."""
        check_choice("adjust_lr_fn", adjust_lr_fn, ("match_rms_adamw", "original"))
        check_counts(ns_steps=ns_steps)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay}, betas=betas, eps=eps)
        self._momentum, self._nesterov, self._steps = momentum, nesterov, int(ns_steps)
        self._matches_adamw = adjust_lr_fn == "match_rms_adamw"

    def step_matrix(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> None:
        """See HiddenApart."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - self._momentum)
        update = gradient.lerp(buffer, self._momentum) if self._nesterov else buffer
        rows, columns = parameter.shape[-2:]
        scale = 0.2 * max(rows, columns) ** 0.5 if self._matches_adamw else max(1.0, rows / columns) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(orthogonal(update, self._steps), alpha=-group["lr"] * scale)


def orthogonal(matrix: Tensor, steps: int) -> Tensor:
    """Nearly the nearest matrix with orthonormal rows or columns, by Newton and Schulz's iteration.

    matrix: (…, rows, columns).
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.to(torch.bfloat16 if matrix.is_cuda or _has_bfloat16() else matrix.dtype)
    x = x.mT if tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=_EPS)
    product = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(steps):
        gram = x @ x.mT
        x = product(x, product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _has_bfloat16() -> bool:
    """Whether this CPU multiplies it in hardware."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
