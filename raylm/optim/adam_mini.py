"""Adam-mini by its paper.

pytorch-optimizer 4.1.0 has the first version's partition: embeddings keep a second moment for each element, other
matrices have a single one, and the size of a head is wrong where keys have fewer heads than queries. It also takes a
model instead of parameters.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch

from raylm.optim.valid import check_betas


class AdamMini(torch.optim.Optimizer):
    """arXiv:2406.16793, Algorithms 1 and 3: one second moment for each block of Hessian structure.

    Matrices, also those of experts, have one for each row: an output or token where weights are stored as
    torch.nn.Linear's, an input in GPT-2 and GPT-OSS. Queries and keys have one for each head, of `block_rows` rows in
    their groups; vectors have one.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        check_betas(betas)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "block_rows": 1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                rows = math.prod(parameter.shape[:-1]) // group["block_rows"] if parameter.ndim > 1 else 1
                state = self.state[parameter]
                if "exp_avg" not in state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = parameter.new_zeros(rows)
                state["step"] += 1
                count, first, second = int(state["step"]), state["exp_avg"], state["exp_avg_sq"]
                blocks = parameter.grad.reshape(rows, -1)
                first.lerp_(parameter.grad, 1 - beta1)
                second.lerp_(blocks.square().mean(1), 1 - beta2)
                pace = (second / (1 - beta2**count)).sqrt_().add_(group["eps"]).mul_(1 - beta1**count)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.view(rows, -1).addcdiv_(first.view(rows, -1), pace[:, None], value=-group["lr"])
