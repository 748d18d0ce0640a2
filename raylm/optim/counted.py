"""Optimizers whose library counts steps by group, made to count them by parameter.

A count of the group is wrong once its parameters have taken different numbers of steps (LISA), and it is nobody's when
state is saved, cut or moved by parameter. Here what a library keeps in a group lies beside each parameter's moments, as
0-d float64 tensors in host memory, and a step sees groups of parameters that agree in it.
"""

from functools import lru_cache
from typing import Any

import torch


@lru_cache
def counted(cls: Any, names: tuple[str, ...]) -> Any:
    """A class that is `cls` with these values of a group (`step`, …) kept by parameter; each must be a number."""
    return type(cls.__name__, (_Counted, cls), {"_counters": names})


class _Counted:
    """Stands before the library's class."""

    _counters: tuple[str, ...]
    param_groups: list[dict[str, Any]]
    state: Any
    defaults: dict[str, Any]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        for group in self.param_groups:
            group["peak_lr"] = group["lr"]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step; parameters without a gradient keep what they have."""
        groups = self.param_groups
        parts = [part for group in groups for part in self._parts(group)]
        self.param_groups = parts
        if hasattr(self, "base_lrs"):  # AdaBound's, one for each group
            self.base_lrs = [part["peak_lr"] for part in parts]
        try:
            super().step()  # type: ignore[misc]
        finally:
            self.param_groups = groups
        for part in parts:
            for parameter in part["params"]:
                slots = self.state[parameter]
                for name in self._counters:
                    if name in slots:
                        slots[name].fill_(part[name])
                    else:
                        slots[name] = torch.tensor(float(part[name]), dtype=torch.float64)

    def _parts(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        members: dict[tuple[float, ...], list[Any]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                members.setdefault(self._counts(parameter), []).append(parameter)
        return [
            {**group, **dict(zip(self._counters, counts, strict=True)), "params": parameters}
            for counts, parameters in members.items()
        ]

    def _counts(self, parameter: Any) -> tuple[float, ...]:
        slots = self.state.get(parameter, {})
        found = []
        for name in self._counters:
            if name not in slots:
                found.append(self.defaults.get(name, 0))
                continue
            slots[name] = slots[name].cpu()  # a state that was put back may lie on the device
            value = float(slots[name])
            found.append(int(value) if name == "step" else value)
        return tuple(found)
