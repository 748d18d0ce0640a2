"""Optimizers of the matrices inside decoder blocks, with AdamW for the rest: embedding, output layer, norms, biases."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from raylm.optim.valid import check_betas


class HiddenApart(torch.optim.Optimizer, ABC):
    """Groups with `hidden` set take `step_matrix`, the others torch.optim's AdamW."""

    counts_on_device = True
    """Fused AdamW reads the count of steps there."""

    def __init__(
        self, params: Iterable[Any], defaults: dict[str, Any], *, betas: tuple[float, float], eps: float
    ) -> None:
        """defaults: of the groups. betas, eps: AdamW's. Raises ValueError."""
        check_betas(betas)
        super().__init__(params, {"hidden": False, **defaults})
        # It owns no groups: a step lends it this optimizer's, and its state.
        self._adamw = torch.optim.AdamW([torch.zeros(1)], betas=betas, eps=eps, fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step."""
        self._adamw.param_groups = [
            {**self._adamw.defaults, **group} for group in self.param_groups if not group["hidden"]
        ]
        self._adamw.state = self.state
        self._adamw.step()
        for group in self.param_groups:
            for parameter in group["params"] if group["hidden"] else ():
                if parameter.grad is not None:
                    self.step_matrix(group, parameter, parameter.grad)

    @abstractmethod
    def step_matrix(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> None:
        """Steps one matrix, (rows, columns), or those of all experts, (experts, rows, columns), in place."""
