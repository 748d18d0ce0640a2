"""The pictures of a sweep."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raylm.training.metrics import read_metrics
from raylm.tuning.importance import without_outliers
from raylm.tuning.journal import Trial
from raylm.tuning.space import shown

RATE, OPTIMIZER = "optimizer.learning_rate", "optimizer.name"
_MOST_LABELLED = 12


def draw_losses(folders: Mapping[int, Path], trials: Sequence[Trial], metric: str, best: int | None) -> bytes | None:
    """The metric of each trial over steps, of those that have it at two steps or more; the best one stands out."""
    from matplotlib import colormaps

    figure, axes = _figure(8, 4.5)
    colours = colormaps["viridis"]
    drawn = 0
    for place, trial in enumerate(trials):
        lines = [line for line in read_metrics(folders[trial.number]) if metric in line]
        points = [(line["step"], line[metric]) for line in lines] or [(one.step, one.value) for one in trial.reports]
        if not points:
            continue
        drawn += 1
        is_best = trial.number == best
        axes.plot(
            *zip(*points, strict=True),
            "o-" if len(points) < 20 else "-",
            markersize=3,
            linewidth=2.4 if is_best else 1,
            color="tab:red" if is_best else colours(place / max(1, len(trials))),
            zorder=3 if is_best else 2,
            label=f"trial {trial.number}" + (" (best)" if is_best else "")
            if place < _MOST_LABELLED or is_best
            else None,
        )
    if not drawn:
        return None
    _limit(axes, [value for trial in trials for value in (report.value for report in trial.reports)])
    axes.set_xlabel("step")
    axes.set_ylabel(metric)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    return _png(figure)


def _limit(axes: Any, values: Sequence[float]) -> None:
    """A trial that diverged would press all others onto one line: the axis ends where most of them do."""
    ordered = sorted(value for value in values if math.isfinite(value))
    if len(ordered) > 4:
        low, high = ordered[0], ordered[int(0.9 * (len(ordered) - 1))]
        if ordered[-1] > high + 3 * (high - low) > low:
            axes.set_ylim(low - 0.1 * (high - low), high + 0.5 * (high - low))


def draw_parallel(
    settings: Sequence[Mapping[str, Any]], values: Sequence[float], metric: str, mode: str
) -> bytes | None:
    """A line a trial through its settings to its metric, the better the brighter. None with less than two trials."""
    from matplotlib import colormaps

    keys = [key for key in dict.fromkeys(name for one in settings for name in one)]
    if len(values) < 2 or not keys:
        return None
    figure, axes = _figure(max(6, 2 + 1.6 * (len(keys) + 1)), 4.5)
    columns = [_column([one.get(key) for one in settings]) for key in keys]
    columns.append(_column(without_outliers(values, mode)))
    sign = 1 if mode == "min" else -1
    order = sorted(range(len(values)), key=lambda place: -sign * values[place])
    colours = colormaps["plasma"]
    for rank, place in enumerate(order):
        heights = [heights[place] for heights, _ in columns]
        colour = colours(0.95 * rank / max(1, len(order) - 1))
        axes.plot(range(len(columns)), heights, color=colour, alpha=0.8, linewidth=2.2 if rank == len(order) - 1 else 1)
    for place, (_, ticks) in enumerate(columns):
        axes.axvline(place, color="black", linewidth=0.6)
        for height, label in ticks:
            axes.annotate(
                label, (place, height), fontsize=7, ha="left", va="center", xytext=(3, 0), textcoords="offset points"
            )
    axes.set_xticks(range(len(columns)), [*(key.replace(".", ".\n") for key in keys), metric], fontsize=8)
    axes.set_yticks([])
    axes.set_xlim(-0.2, len(columns) - 0.4)
    return _png(figure)


def _column(values: Sequence[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Height of each value between 0 and 1, and labelled ticks; what a trial does not have is at the bottom."""
    known = [value for value in values if value is not None]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in known)
    if not known or not numbers or len(set(known)) < 3:
        names = list(dict.fromkeys(map(shown, sorted(known) if numbers else known)))
        heights = {name: (place + 1) / (len(names) + 1) for place, name in enumerate(names)}
        return [heights[shown(value)] if value is not None else 0.0 for value in values], [
            (height, name) for name, height in heights.items()
        ]
    low, high = min(known), max(known)
    wide = low > 0 and high / low > 20
    scale = math.log if wide else float

    def height(value: float) -> float:
        return 0.05 + 0.95 * (scale(value) - scale(low)) / (scale(high) - scale(low))

    middle = math.sqrt(low * high) if wide else (low + high) / 2
    ticks = [(height(value), shown(float(value))) for value in (low, middle, high)]
    return [0.0 if value is None else height(value) for value in values], ticks


def draw_importances(found: Mapping[str, float]) -> bytes | None:
    """A bar for each setting; None without any."""
    if not found:
        return None
    figure, axes = _figure(7, 0.8 + 0.35 * len(found))
    names = list(found)[::-1]
    axes.barh(names, [found[name] for name in names], color="tab:blue")
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the variance explained alone")
    return _png(figure)


def draw_rates(settings: Sequence[Mapping[str, Any]], values: Sequence[float], metric: str) -> bytes | None:
    """The metric over the learning rate, a line for each optimizer; None where all trials have the same rate."""
    points = [
        (one[RATE], value, str(one.get(OPTIMIZER, "")))
        for one, value in zip(settings, values, strict=True)
        if RATE in one
    ]
    if len({rate for rate, _, _ in points}) < 2:
        return None
    figure, axes = _figure(8, 4.5)
    markers = "os^vD<>phX*"
    for place, name in enumerate(sorted({name for _, _, name in points})):
        own = sorted((rate, value) for rate, value, other in points if other == name)
        axes.plot(
            *zip(*own, strict=True), f"{markers[place % len(markers)]}-", linewidth=1, markersize=5, label=name or None
        )
    axes.set_xscale("log")
    _limit(axes, values)
    axes.set_xlabel("learning rate")
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3, which="both")
    if any(name for _, _, name in points):
        axes.legend(fontsize=7, ncols=2)
    return _png(figure)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _png(figure: Any) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()
