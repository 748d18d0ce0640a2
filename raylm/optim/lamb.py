"""LAMB by its paper.

pytorch-optimizer 4.1.0 does not correct the second moment's bias, puts the decay outside the trust ratio, and cuts the
weight's norm at 10.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from raylm.optim.valid import check_betas


class Lamb(torch.optim.Optimizer):
    """arXiv:1904.00962, Algorithm 2, with phi the identity. Counts steps by group: use through `counted`."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        check_betas(betas)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                state = self.state[parameter]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
            # Together on a GPU, where launches cost most; one after the other elsewhere: no second set of updates.
            if any(parameter.is_cuda for parameter in parameters):
                self._update(group, parameters)
            else:
                for parameter in parameters:
                    self._update_one(group, parameter, parameter.grad)

    def _update_one(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> None:
        """The same in fewer passes over memory and with one tensor of the weight's size besides."""
        (beta1, beta2), decay, count = group["betas"], group["weight_decay"], group["step"]
        state = self.state[parameter]
        first, second = state["exp_avg"], state["exp_avg_sq"]
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        correction = 1 - beta1**count
        update = second.sqrt().mul_(correction / (1 - beta2**count) ** 0.5).add_(group["eps"] * correction)
        torch.div(first, update, out=update)
        if decay:
            update.add_(parameter, alpha=decay)
        length, pace = float(parameter.norm()), float(update.norm())
        ratio = length / pace if length > 0 and pace > 0 else 1.0
        parameter.add_(update, alpha=-group["lr"] * ratio)

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        (beta1, beta2), decay, count = group["betas"], group["weight_decay"], group["step"]
        gradients = [parameter.grad for parameter in parameters]
        first = [self.state[parameter]["exp_avg"] for parameter in parameters]
        second = [self.state[parameter]["exp_avg_sq"] for parameter in parameters]
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        roots = torch._foreach_div(second, 1 - beta2**count)
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        updates = torch._foreach_div(first, 1 - beta1**count)
        torch._foreach_div_(updates, roots)
        if decay:
            torch._foreach_add_(updates, parameters, alpha=decay)
        lengths, paces = torch._foreach_norm(parameters), torch._foreach_norm(updates)
        ratios = [
            torch.where((length > 0) & (pace > 0), length / pace, 1.0)
            for length, pace in zip(lengths, paces, strict=True)
        ]
        torch._foreach_mul_(updates, ratios)
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])
