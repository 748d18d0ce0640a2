"""Dynamic loss scaling for fp16 steps: torch.amp.GradScaler's rules, for gradients that may be cut among ranks.

The scaled loss lifts small gradients into fp16's range. Gradients are unscaled before they are clipped, and a step
whose gradient norm is not finite is passed over, with a smaller scale from then on. The norm is that of all ranks, so
all of them agree without a collective of their own; torch's class looks at the local gradients only.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from raylm.errors import TrainingError

INITIAL, GROWTH, BACKOFF, GROWTH_INTERVAL = 65536.0, 2.0, 0.5, 2000
"""torch.amp.GradScaler's defaults."""
SMALLEST = 1.0
_KEYS = ("scale", "growth_tracker", "overflows")


class LossScaler:
    """The scale of a run. overflows: steps that were passed over, growth_tracker: those taken since it last changed."""

    def __init__(self, *, initial: float = INITIAL, growth_interval: int = GROWTH_INTERVAL) -> None:
        self.scale, self.growth_tracker, self.overflows = initial, 0, 0
        self._interval = growth_interval

    def unscale(self, optimizer: Any) -> None:
        """Divides the gradients of an optimizer's parameters by the scale."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(1.0 / self.scale)

    def accepts(self, grad_norm: float, optimizer: Any, *, step: int) -> bool:
        """Whether the step is to be taken; sets the scale of the next one, and drops the gradients of a bad one.

        Raises TrainingError when gradients are not finite without scaling either.
        """
        if math.isfinite(grad_norm):
            self.growth_tracker += 1
            if self.growth_tracker == self._interval:
                self.scale, self.growth_tracker = self.scale * GROWTH, 0
            return True
        optimizer.zero_grad(set_to_none=True)
        self.scale, self.growth_tracker, self.overflows = self.scale * BACKOFF, 0, self.overflows + 1
        if self.scale < SMALLEST:
            raise TrainingError(
                f"step {step}",
                "the gradients are not finite at any loss scale; the weights were not updated.",
                "Set training.precision=fp32, or lower optimizer.learning_rate.",
            )
        return False

    def figures(self) -> dict[str, float]:
        """For the metrics of a step."""
        return {"train/loss_scale": self.scale, "train/overflow_steps": self.overflows}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {f"scaler/{key}": torch.tensor(getattr(self, key), dtype=torch.float64) for key in _KEYS}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `state` returned; a checkpoint of another precision has none of it."""
        if "scaler/scale" in state:
            self.scale, tracker, overflows = (float(state[f"scaler/{key}"]) for key in _KEYS)
            self.growth_tracker, self.overflows = int(tracker), int(overflows)
