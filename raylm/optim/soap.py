"""SOAP with state that can be saved, cut and moved by name.

pytorch-optimizer keeps the statistics of rows and columns and their eigenbases in lists inside a parameter's state.
Here they are tensors of their own (`gram_0`, `basis_0`, …), and lists for the length of a step only.
"""

from typing import Any

import torch
from pytorch_optimizer import SOAP
from torch import Tensor

_LISTS = {"GG": "gram", "Q": "basis"}
_FROM_GROUP = ("precondition_frequency", "shampoo_beta")


class Soap(SOAP):
    """arXiv:2409.11321, Algorithm 3. A parameter's first step makes its bases and leaves the weight, as the authors'
    code does. Counts steps by group: use through `counted`."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step."""
        stepped = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for group, parameter in stepped:
            if parameter in self.state:
                self._to_lists(group, parameter, self.state[parameter])
        super().step()
        for _, parameter in stepped:
            self._to_tensors(self.state[parameter])

    def _to_lists(self, group: dict[str, Any], parameter: Tensor, state: dict[str, Any]) -> None:
        if "exp_avg" not in state:
            return
        dimensions = 1 if parameter.ndim == 1 else parameter.ndim
        for name, slot in _LISTS.items():
            state[name] = [state.pop(f"{slot}_{number}", []) for number in range(dimensions)]
        state["precondition_frequency"] = group["precondition_frequency"]
        state["shampoo_beta"] = group["betas"][1] if group["shampoo_beta"] is None else group["shampoo_beta"]

    def _to_tensors(self, state: dict[str, Any]) -> None:
        for name, slot in _LISTS.items():
            for number, value in enumerate(state.pop(name, [])):
                if isinstance(value, Tensor):
                    state[f"{slot}_{number}"] = value.contiguous()
        for name in _FROM_GROUP:
            state.pop(name, None)
