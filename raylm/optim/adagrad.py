"""Adagrad whose state exists from a parameter's first step on.

torch.optim.Adagrad makes the sums of all parameters when it is built and never again: LISA could not free those of
blocks that rest, and DeepSpeed replaces the class by one that has lost its groups.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.adagrad import adagrad


class Adagrad(torch.optim.Optimizer):
    """Duchi, Hazan and Singer, JMLR 12 (2011), the diagonal form, by torch.optim's function."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                state = self.state[parameter]
                if "sum" not in state:
                    state["step"] = torch.tensor(0.0)
                    state["sum"] = torch.full_like(parameter, group["initial_accumulator_value"])
            states = [self.state[parameter] for parameter in parameters]
            adagrad(
                parameters,
                [parameter.grad for parameter in parameters],
                [state["sum"] for state in states],
                [state["step"] for state in states],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                lr_decay=group["lr_decay"],
                eps=group["eps"],
                maximize=False,
            )
