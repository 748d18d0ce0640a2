"""Learning rates over steps, as plain functions of the step: nothing to save, nothing to drift on resume."""

import math
from collections.abc import Callable

from raylm.config.training import ScheduleSection

Shape = Callable[[float, ScheduleSection], float]


def _constant(progress: float, section: ScheduleSection) -> float:
    return 1.0


def _linear(progress: float, section: ScheduleSection) -> float:
    return 1.0 - progress


def _cosine(progress: float, section: ScheduleSection) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _polynomial(progress: float, section: ScheduleSection) -> float:
    return float((1.0 - progress) ** section.power)


def _wsd(progress: float, section: ScheduleSection) -> float:
    return min(1.0, (1.0 - progress) / section.decay_share)


SHAPES: dict[str, Shape] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "polynomial": _polynomial,
    "wsd": _wsd,  # arXiv:2404.06395, section 4
}
"""Share of the way from the lowest to the peak rate, by progress after the warm-up (0 … 1)."""


def learning_rate_factor(section: ScheduleSection, step: int, num_steps: int) -> float:
    """What the peak rate is multiplied with at `step` (0-based) of a run of `num_steps`.

    Warm-up reaches the peak at step warmup_steps - 1, so the first step already moves the weights.
    """
    if section.name == "one_cycle":
        return _one_cycle(section, step, num_steps)
    if step < section.warmup_steps:
        return (step + 1) / section.warmup_steps
    if section.name == "inverse_sqrt":  # arXiv:1706.03762, equation 3; its time is that of the warm-up
        return max(section.min_ratio, math.sqrt(section.warmup_steps / (step + 1)))
    span = max(1, num_steps - section.warmup_steps)
    progress = min(1.0, (step - section.warmup_steps) / span)
    return section.min_ratio + (1.0 - section.min_ratio) * SHAPES[section.name](progress, section)


def _one_cycle(section: ScheduleSection, step: int, num_steps: int) -> float:
    """arXiv:1708.07120: up to the peak along a cosine, and down to the lowest rate at the last step along another."""
    top = section.rise_share * num_steps - 1
    if step <= top:
        start, end, progress = section.start_ratio, 1.0, step / top if top > 0 else 1.0
    else:
        start, end, progress = 1.0, section.min_ratio, min(1.0, (step - top) / (num_steps - 1 - top))
    return end + (start - end) * _cosine(progress, section)
