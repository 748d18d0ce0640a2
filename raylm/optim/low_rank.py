"""GaLore and APOLLO: moments of projected gradients for the matrices inside decoder blocks, AdamW for the rest.

pytorch-optimizer 4.1.0 keeps the projection in an object that no checkpoint can hold. Its APOLLO scales the projected
gradient and projects it back; in the paper the whole gradient is scaled, so that updates are not of low rank.
"""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from raylm.optim.hidden import HiddenApart
from raylm.optim.valid import check_choice, check_counts


class _LowRank(HiddenApart):
    """Matrices are projected onto `rank` directions of their shorter side, which are drawn anew every `interval_steps`
    steps."""

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float], eps: float, **own: Any) -> None:
        check_counts(rank=own["rank"], interval_steps=own["interval_steps"])
        super().__init__(
            params, {"lr": lr, "weight_decay": 0.0, "betas": betas, "eps": eps, **own}, betas=betas, eps=eps
        )

    def step_matrix(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> None:
        """See HiddenApart."""
        update = self._update(group, gradient, self.state[parameter])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * group["scale"])

    def _update(self, group: dict[str, Any], gradient: Tensor, state: dict[str, Any]) -> Tensor:
        tall = gradient.shape[-2] >= gradient.shape[-1]
        gradient = gradient.mT if tall else gradient  # (…, short, long) from here on
        if "step" not in state:
            state["step"] = torch.tensor(0.0)
        number, since = divmod(int(state["step"]), int(group["interval_steps"]))
        if since == 0:
            state["projection"] = self._projection(gradient, min(int(group["rank"]), gradient.shape[-2]), number)
        low = state["projection"].mT @ gradient  # (…, rank, long)
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(low), torch.zeros_like(low)
        state["step"] += 1
        count, (beta1, beta2) = int(state["step"]), group["betas"]
        state["exp_avg"].lerp_(low, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(low, low, value=1 - beta2)
        pace = (state["exp_avg_sq"] / (1 - beta2**count)).sqrt_().add_(group["eps"])
        update = self._whole(group, gradient, low, state["exp_avg"] / pace / (1 - beta1**count), state)
        return update.mT if tall else update

    @abstractmethod
    def _projection(self, gradient: Tensor, rank: int, number: int) -> Tensor:
        """(…, short, rank), or the same for all, (short, rank). number: of the projection, from 0."""

    @abstractmethod
    def _whole(
        self, group: dict[str, Any], gradient: Tensor, low: Tensor, step: Tensor, state: dict[str, Any]
    ) -> Tensor:
        """The update, (…, short, long), from Adam's step in the projection, (…, rank, long)."""


class GaLore(_LowRank):
    """arXiv:2403.03507, Algorithm 2: Adam in the space of the gradient's largest singular vectors."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        rank: int = 128,
        interval_steps: int = 200,
        scale: float = 0.25,
    ) -> None:
        """interval_steps: the paper's subspace change frequency T; scale: its alpha."""
        super().__init__(params, lr, betas, eps, rank=rank, interval_steps=interval_steps, scale=scale)

    def _projection(self, gradient: Tensor, rank: int, number: int) -> Tensor:
        vectors: Tensor = torch.linalg.svd(gradient, full_matrices=False)[0]
        return vectors[..., :rank].contiguous()

    def _whole(
        self, group: dict[str, Any], gradient: Tensor, low: Tensor, step: Tensor, state: dict[str, Any]
    ) -> Tensor:
        whole: Tensor = state["projection"] @ step
        return whole


class Apollo(_LowRank):
    """arXiv:2412.05270, Algorithm 1: the gradient, each channel scaled as Adam scales it in a random projection."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        rank: int = 128,
        interval_steps: int = 200,
        scale: float = 1.0,
        scale_type: Literal["channel", "tensor"] = "channel",
        max_growth: float = 1.01,
    ) -> None:
        """scale_type: a scale for each channel, or one for the whole (APOLLO-Mini: with rank=1, scale=11.3, the square
        root of 128). max_growth: of the update's norm from one step to the next, the paper's gamma."""
        check_choice("scale_type", scale_type, ("channel", "tensor"))
        super().__init__(
            params,
            lr,
            betas,
            eps,
            rank=rank,
            interval_steps=interval_steps,
            scale=scale,
            scale_type=scale_type,
            max_growth=max_growth,
        )

    def _projection(self, gradient: Tensor, rank: int, number: int) -> Tensor:
        """A function of number and shape alone: all ranks and resumed runs draw the same."""
        short, long = gradient.shape[-2:]
        generator = torch.Generator().manual_seed((number * 1_000_003 + short) * 1_000_003 + long)
        drawn = torch.randn(short, rank, generator=generator, dtype=torch.float64) / rank**0.5
        return drawn.to(gradient.device, gradient.dtype)

    def _whole(
        self, group: dict[str, Any], gradient: Tensor, low: Tensor, step: Tensor, state: dict[str, Any]
    ) -> Tensor:
        over = -2 if group["scale_type"] == "channel" else (-2, -1)
        length = torch.linalg.vector_norm(low, dim=over, keepdim=True).clamp_(1e-30)
        update = gradient * (torch.linalg.vector_norm(step, dim=over, keepdim=True) / length)
        norm = torch.linalg.matrix_norm(update, keepdim=True)
        before = state.get("update_norm")
        if before is not None:
            limit = (before * group["max_growth"] / norm.clamp(1e-30)).clamp_(max=1.0)
            limit = torch.where(before > 0, limit, 1.0)
            update *= limit
            norm *= limit
        state["update_norm"] = norm
        return update
