"""The curves of a run as one picture."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Panel:
    """One diagram over steps. figures: key of metrics.jsonl -> label and style of its line."""

    title: str
    figures: dict[str, tuple[str, str]]


PANELS = (
    Panel("loss (nats per token)", {"train/loss": ("train", "-"), "eval/loss": ("eval", "o-")}),
    Panel("learning rate", {"train/learning_rate": ("", "-")}),
    Panel("gradient norm (before clipping)", {"train/grad_norm": ("", "-")}),
    Panel("tokens per second", {"train/tokens_per_second": ("", "-")}),
)


def draw_curves(lines: Sequence[dict[str, Any]]) -> bytes | None:
    """A PNG of all panels; None when there is nothing to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not any(key in line for line in lines for panel in PANELS for key in panel.figures):
        return None
    figure = Figure(figsize=(10, 6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for key, (label, style) in panel.figures.items():
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2, markersize=4)
                if label:
                    axes.legend()
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()
