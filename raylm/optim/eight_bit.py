"""AdamW and Lion whose state is 8 bits a number, by bitsandbytes, and their paged forms.

State is quantised in blocks of 256 consecutive elements, each with a scale of its own (arXiv:2110.02861); parameters of
fewer than `min_8bit_size` elements keep fp32. bitsandbytes counts steps in plain numbers; what was put back from a
checkpoint is a tensor.
"""

from collections.abc import Iterable
from typing import Any

import torch
from bitsandbytes.optim import AdamW8bit, Lion8bit
from torch import Tensor


class _EightBit:
    """Stands before the library's class."""

    param_groups: list[dict[str, Any]]
    state: Any
    is_paged: bool

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter in self.state:
                    self._settle(parameter, self.state[parameter])
        super().step()  # type: ignore[misc]

    def _settle(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """Counts as numbers; paged state in pages, which a copy of it is not."""
        if isinstance(state.get("step"), Tensor):
            state["step"] = int(state["step"])
        for name in ("state1", "state2"):
            value = state.get(name)
            if self.is_paged and parameter.is_cuda and isinstance(value, Tensor) and not hasattr(value, "is_paged"):
                pages = self.get_state_buffer(parameter, dtype=value.dtype)
                if hasattr(pages, "is_paged"):  # the library has none for small parameters
                    state[name] = pages.copy_(value)

    def get_state_buffer(self, p: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The library's; on CPUs, where state is in host memory anyway, without its warning that there are no pages."""
        if p.device.type == "cpu":
            return torch.zeros_like(p, dtype=dtype)
        buffer: Tensor = super().get_state_buffer(p, dtype=dtype)  # type: ignore[misc]
        return buffer


class AdamW(_EightBit, AdamW8bit):
    """arXiv:1711.05101, Algorithm 2, in 8 bits."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        min_8bit_size: int = 4096,
    ) -> None:
        super().__init__(params, lr, betas, eps, 0.0, min_8bit_size=int(min_8bit_size), is_paged=self._paged)

    _paged = False


class Lion(_EightBit, Lion8bit):
    """arXiv:2302.06675, Algorithm 2, in 8 bits."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        min_8bit_size: int = 4096,
    ) -> None:
        super().__init__(params, lr, betas, 0.0, min_8bit_size=int(min_8bit_size), is_paged=self._paged)

    _paged = False


class PagedAdamW(AdamW):
    """State in memory that the driver moves between host and GPU."""

    _paged = True


class PagedLion(Lion):
    """State in memory that the driver moves between host and GPU."""

    _paged = True
