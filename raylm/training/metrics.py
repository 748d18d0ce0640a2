"""Where the figures of a run go: one JSON line a step, TensorBoard, and a picture of the loss."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"


class MetricsWriter:
    """Appends to metrics.jsonl, and TensorBoard events if asked. A resumed run first drops the lines of steps that
    it takes again, so that each step stands there once."""

    def __init__(self, run_dir: Path, *, start_step: int, tensorboard: bool) -> None:
        path = run_dir / METRICS_FILE
        kept = [line for line in read_metrics(run_dir) if line["step"] <= start_step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.rename(path)
        self._file = path.open("a", buffering=1)
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, figures: Mapping[str, float | int]) -> None:
        """One line; keys are `train/…` or `eval/…`."""
        self._file.write(json.dumps({"step": step, **figures}) + "\n")
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes all sinks."""
        self._file.close()
        if self._board is not None:
            self._board.close()


class EventsWriter:
    """Appends the phases of a run to events.jsonl, for whoever watches it."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / EVENTS_FILE

    def write(self, phase: str, **details: Any) -> None:
        """One line: what the run does from now on."""
        with self._path.open("a") as file:
            file.write(json.dumps({"phase": phase, **details}) + "\n")


def read_metrics(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line cut off by a killed process is left out."""
    path = run_dir / METRICS_FILE
    if not path.is_file():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def final_figures(run_dir: Path) -> dict[str, Any]:
    """The newest value of each figure."""
    newest: dict[str, Any] = {}
    for line in read_metrics(run_dir):
        newest.update(line)
    return newest


def plot_losses(run_dir: Path, target: Path) -> None:
    """Draws training and evaluation loss over steps as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = list(read_metrics(run_dir))
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label, style in (("train/loss", "train", "-"), ("eval/loss", "eval", "o-")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2, markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(target)
