"""How much each setting alone explains of the differences between trials.

For a setting, trials are put into groups: of equal values, or of a quarter each by rank for numbers with more than four
values. The importance is omega squared of these groups: the share of the variance of the metric that lies between them,
less what as many groups of random trials would have. It knows no interactions, and few trials say little.

A value further beyond the third quartile than that is from the best counts as that far: one trial that diverged would
else be all of the variance. Source: Hays, Statistics for Psychologists (1963), chapter 12.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

FEWEST_TRIALS = 4


def importances(settings: Sequence[Mapping[str, Any]], values: Sequence[float], *, mode: str) -> dict[str, float]:
    """Setting -> share between 0 and 1, the largest first. A setting that only some trials have is judged by those.

    values: one a trial; mode: whether low or high ones are good. Settings with less than FEWEST_TRIALS trials, or with
    one value, are left out.
    """
    clipped = without_outliers(values, mode)
    found: dict[str, float] = {}
    for key in dict.fromkeys(name for one in settings for name in one):
        pairs = [(one[key], value) for one, value in zip(settings, clipped, strict=True) if key in one]
        groups = _groups([pair[0] for pair in pairs])
        if len(pairs) >= FEWEST_TRIALS and len(set(groups)) > 1:
            found[key] = _omega_squared(groups, [pair[1] for pair in pairs])
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def without_outliers(values: Sequence[float], mode: str) -> list[float]:
    """The values, those far beyond the others cut off where they no longer tell."""
    sign = 1.0 if mode == "min" else -1.0
    ordered = sorted(sign * value for value in values)
    if not ordered:
        return []
    best, quartile = ordered[0], ordered[3 * (len(ordered) - 1) // 4]
    bound = 2 * quartile - best if quartile > best else ordered[-1]
    return [min(sign * value, bound) for value in values]


def _groups(values: Sequence[Any]) -> list[Hashable]:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if not numbers or len(set(values)) <= 4:
        return [repr(value) for value in values]
    ordered = sorted(values)
    return [4 * ordered.index(value) // len(ordered) for value in values]


def _omega_squared(groups: Sequence[Hashable], values: Sequence[float]) -> float:
    total_mean = sum(values) / len(values)
    total = sum((value - total_mean) ** 2 for value in values)
    names = set(groups)
    between = 0.0
    for name in names:
        members = [value for group, value in zip(groups, values, strict=True) if group == name]
        between += len(members) * (sum(members) / len(members) - total_mean) ** 2
    within_freedom = len(values) - len(names)
    if total <= 0 or within_freedom <= 0:
        return 0.0
    within = (total - between) / within_freedom
    return min(1.0, max(0.0, (between - (len(names) - 1) * within) / (total + within)))
