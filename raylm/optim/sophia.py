"""Sophia-G, whose curvature the training loop estimates. pytorch-optimizer has Sophia-H only."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from raylm.optim.valid import check_betas, check_counts


class Sophia(torch.optim.Optimizer):
    """arXiv:2305.14342, Algorithm 3 with the estimator of Algorithm 2 (Gauss-Newton-Bartlett)."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.96, 0.99),
        gamma: float = 0.05,
        eps: float = 1e-12,
        hessian_interval_steps: int = 10,
        weight_decay: float = 0.0,
    ) -> None:
        """gamma: a step is as long as the rate where the momentum is above gamma x curvature. hessian_interval_steps:
        steps from one estimate to the next."""
        check_betas(betas)
        check_counts(hessian_interval_steps=hessian_interval_steps)
        super().__init__(params, {"lr": lr, "betas": betas, "gamma": gamma, "eps": eps, "weight_decay": weight_decay})
        self.hessian_interval_steps = int(hessian_interval_steps)

    @torch.no_grad()
    def update_hessian(self, num_labels: int) -> None:
        """Takes an estimate in. Gradients are those of the mean loss over num_labels labels drawn from the model."""
        for group in self.param_groups:
            beta = group["betas"][1]
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _, hessian = self._slots(parameter)
                    hessian.mul_(beta).addcmul_(parameter.grad, parameter.grad, value=(1 - beta) * num_labels)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    momentum, hessian = self._slots(parameter)
                    momentum.lerp_(parameter.grad, 1 - group["betas"][0])
                    pace = (hessian * group["gamma"]).clamp_(min=group["eps"])
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_((momentum / pace).clamp_(-1, 1), alpha=-group["lr"])

    def _slots(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        state = self.state[parameter]
        for name in ("exp_avg", "hessian"):
            if name not in state:
                state[name] = torch.zeros_like(parameter)
        return state["exp_avg"], state["hessian"]
