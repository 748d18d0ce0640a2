"""Points of a sweep's space: settings by dotted key, with dimensions that depend on other settings.

Everything is a function of its arguments: a draw depends on the generator that is given, so trial n of a seed is the
same in every session.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from raylm.config.space import DimensionSection
from raylm.errors import ConfigError
from raylm.optim.table import optimizer_row

Settings = dict[str, Any]
Space = Mapping[str, Sequence[DimensionSection]]
OPTIMIZER_KEY = "optimizer.name"
MOST_COMBINATIONS = 100_000


def ordered(space: Space) -> list[str]:
    """The keys, each after those that its conditions look at. Raises ConfigError for conditions in a circle."""
    done: list[str] = []
    waiting = list(space)
    while waiting:
        ready = [key for key in waiting if not any(other in waiting for other in _looks_at(space[key]) if other != key)]
        if not ready or any(key in _looks_at(space[key]) for key in ready):
            raise ConfigError(f"space.{waiting[0]}", "its conditions depend on themselves.", "Change a `when`.")
        done.append(ready[0])
        waiting.remove(ready[0])
    return done


def _looks_at(alternatives: Sequence[DimensionSection]) -> set[str]:
    found = {key for dimension in alternatives for key in dimension.when}
    return found | ({OPTIMIZER_KEY} if any(dimension.suggested for dimension in alternatives) else set())


def active(alternatives: Sequence[DimensionSection], settings: Mapping[str, Any], base: Mapping[str, Any]) -> Any:
    """The first dimension whose conditions hold, or None. base: the settings that the space leaves alone, flat.

    A suggested range is that of the optimizer chosen by then. Raises ConfigError for an optimizer without a row.
    """
    values = {**base, **settings}
    for dimension in alternatives:
        if all(holds(values.get(key), wanted) for key, wanted in dimension.when.items()):
            return _suggested(dimension, str(values.get(OPTIMIZER_KEY))) if dimension.suggested else dimension
    return None


def holds(value: Any, wanted: Any) -> bool:
    """Whether a setting is what a condition wants: the value, or one of several."""
    return value in wanted if isinstance(wanted, list | tuple) else value == wanted


def _suggested(dimension: DimensionSection, optimizer: str) -> DimensionSection:
    return DimensionSection(loguniform=optimizer_row(optimizer).learning_rates, points=dimension.points)


def combinations(
    space: Space, base: Mapping[str, Any], values_of: Callable[[DimensionSection], Sequence[Any]]
) -> Iterator[Settings]:
    """All settings that take, for each active dimension, one of `values_of(dimension)`; later keys vary fastest.

    Raises ConfigError when there are more than MOST_COMBINATIONS.
    """
    keys = ordered(space)

    def extend(place: int, settings: Settings) -> Iterator[Settings]:
        if place == len(keys):
            yield settings
            return
        key = keys[place]
        dimension = active(space[key], settings, base)
        if dimension is None:
            yield from extend(place + 1, settings)
            return
        for value in values_of(dimension):
            yield from extend(place + 1, {**settings, key: value})

    for count, settings in enumerate(extend(0, {})):
        if count >= MOST_COMBINATIONS:
            raise ConfigError("space", f"has more than {MOST_COMBINATIONS:,} combinations.", "Set search.name=random.")
        yield settings


def grid_values(dimension: DimensionSection) -> Sequence[Any]:
    """What a grid search takes: the values, or points of a range with equal distances (of logarithms)."""
    if dimension.values is not None:
        return dimension.values
    assert dimension.points is not None
    low, high = dimension.bounds
    shares = [place / (dimension.points - 1) for place in range(dimension.points)]
    return list(dict.fromkeys(_at(dimension, share, low, high) for share in shares))


def edge_values(dimension: DimensionSection) -> Sequence[Any]:
    """The values, or both ends of a range."""
    if dimension.values is not None:
        return dimension.values
    low, high = dimension.bounds
    return list(dict.fromkeys(_at(dimension, share, low, high) for share in (0.0, 1.0)))


def fixed_grids(space: Space, base: Mapping[str, Any]) -> list[Settings]:
    """The combinations of the dimensions of kind `grid`, which trials go through in turn; one empty one without any.

    Dimensions that only some combinations have are drawn with the rest.
    """
    grids = {
        key: alternatives
        for key, alternatives in space.items()
        if all(dimension.kind == "grid" and not dimension.when for dimension in alternatives)
    }
    return list(combinations(grids, base, grid_values))


def draw(space: Space, base: Mapping[str, Any], rng: random.Random, given: Mapping[str, Any]) -> Settings:
    """One point of the space. given: settings that are decided already."""
    settings: Settings = {}
    for key in ordered(space):
        if key in given:
            settings[key] = given[key]
        elif (dimension := active(space[key], settings, base)) is not None:
            settings[key] = draw_value(dimension, rng)
    return settings


def edge_draws(space: Space, base: Mapping[str, Any], rng: random.Random, most: int) -> Iterator[Settings]:
    """Points of values and ends of ranges: half of each at random, for conditions on several settings, and half that
    which came least so far, for the rest."""
    uses: Counter[tuple[str, str]] = Counter()
    keys = ordered(space)
    for _ in range(most):
        settings: Settings = {}
        for key in keys:
            if (dimension := active(space[key], settings, base)) is None:
                continue
            values = edge_values(dimension)
            if rng.random() < 0.5:
                settings[key] = rng.choice(values)
            else:
                settings[key] = min(values, key=lambda value, key=key: uses[key, repr(value)])  # type: ignore[misc]
            uses[key, repr(settings[key])] += 1
        yield settings


def draw_value(dimension: DimensionSection, rng: random.Random) -> Any:
    """One value of a dimension."""
    if dimension.values is not None:
        return dimension.values[rng.randrange(len(dimension.values))]
    low, high = dimension.bounds
    if dimension.kind == "integers":
        return rng.randint(int(low), int(high))
    return _at(dimension, rng.random(), low, high)


def _at(dimension: DimensionSection, share: float, low: float, high: float) -> float | int:
    """The value at a share of a range, by its scale, on its steps."""
    if share in (0.0, 1.0):
        value = high if share else low
    elif dimension.is_logarithmic:
        value = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    else:
        value = low + share * (high - low)
    return on_steps(dimension, value)


def on_steps(dimension: DimensionSection, value: float) -> float | int:
    """The nearest value that a range has."""
    low, high = dimension.bounds
    if dimension.step is not None:
        step = dimension.step
        value = round(value / step) * step
        value = math.ceil(low / step - 1e-9) * step if value < low else value
        value = math.floor(high / step + 1e-9) * step if value > high else value
        value = float(f"{value:.12g}")  # 0.1 * 3 as 0.3
    value = min(max(value, low), high)
    return int(value) if dimension.is_integer else float(value)


def perturbed(
    space: Space,
    base: Mapping[str, Any],
    settings: Mapping[str, Any],
    rng: random.Random,
    *,
    factors: tuple[float, float],
    resample_probability: float,
) -> Settings:
    """Settings near others, as population based training explores: a number times one of the factors within its range,
    a choice one place on, or either drawn anew. Source: arXiv:1711.09846, appendix A."""
    changed: Settings = {}
    for key in ordered(space):
        dimension = active(space[key], changed, base)
        if dimension is None:
            continue
        former = settings.get(key)
        if former is None or rng.random() < resample_probability:
            changed[key] = draw_value(dimension, rng)
        elif dimension.values is not None:
            values = list(dimension.values)
            place = values.index(former) if former in values else rng.randrange(len(values))
            changed[key] = values[min(max(place + rng.choice((-1, 1)), 0), len(values) - 1)]
        else:
            changed[key] = on_steps(dimension, former * rng.choice(factors))
    return changed


def described(settings: Mapping[str, Any]) -> str:
    """Settings in a line, as on a command line."""
    return " ".join(f"{key}={shown(value)}" for key, value in settings.items()) or "the base"


def shown(value: Any) -> str:
    """A setting as it stands in tables: numbers with four digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "null" if value is None else str(value).replace("True", "true").replace("False", "false")
