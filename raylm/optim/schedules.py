"""Learning rates over steps, as plain functions of the step: nothing to save, nothing to drift on resume."""

import math
from collections.abc import Callable

from raylm.config.training import ScheduleSection


def _constant(progress: float) -> float:
    return 1.0


def _linear(progress: float) -> float:
    return 1.0 - progress


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


SHAPES: dict[str, Callable[[float], float]] = {"constant": _constant, "linear": _linear, "cosine": _cosine}
"""Share of the way from the lowest to the peak rate, by progress after the warm-up (0 … 1)."""


def learning_rate_factor(section: ScheduleSection, step: int, num_steps: int) -> float:
    """What the peak rate is multiplied with at `step` (0-based) of a run of `num_steps`.

    Warm-up reaches the peak at step warmup_steps - 1, so the first step already moves the weights.
    """
    if step < section.warmup_steps:
        return (step + 1) / section.warmup_steps
    span = max(1, num_steps - section.warmup_steps)
    progress = min(1.0, (step - section.warmup_steps) / span)
    return section.min_ratio + (1.0 - section.min_ratio) * SHAPES[section.name](progress)
