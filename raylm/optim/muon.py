"""Muon for the matrices inside decoder blocks, AdamW for the rest: embedding, output layer, norms, biases.

Both are torch.optim's. Muon's momentum there is an average (lerp), not a sum: only the scale differs, which the
orthogonalisation takes out, but for its eps. It orthogonalises in bfloat16, as its author does.
"""

from collections.abc import Iterable
from typing import Any

import torch


class MuonWithAdamW(torch.optim.Optimizer):
    """Groups with `hidden` set take Muon (arXiv:2502.16982, with the rate scaled to AdamW's), the others AdamW."""

    counts_on_device = True
    """Fused AdamW reads the count of steps there."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        """momentum … adjust_lr_fn: Muon's; betas, eps: AdamW's."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "hidden": False})
        # They own no groups: a step lends them this optimizer's, and its state.
        unused = [torch.zeros(1, 1)]
        self._inner = {
            True: torch.optim.Muon(
                unused, momentum=momentum, nesterov=nesterov, ns_steps=int(ns_steps), adjust_lr_fn=adjust_lr_fn
            ),
            False: torch.optim.AdamW(unused, betas=betas, eps=eps, fused=True),
        }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step."""
        for hidden, inner in self._inner.items():
            inner.param_groups = [
                {**inner.defaults, **group} for group in self.param_groups if group["hidden"] == hidden
            ]
            inner.state = self.state
            inner.step()
