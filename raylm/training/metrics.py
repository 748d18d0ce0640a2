"""The files that the figures and phases of a run stand in, one JSON object a line, and a picture of the loss.

Whoever watches a run reads these: progress bar, sinks (training/sinks), report, `raylm runs`.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
FIGURES = (
    "train/loss",
    "train/grad_norm",
    "train/learning_rate",
    "train/epoch",
    "train/tokens",
    "train/loss_tokens",
    "train/tokens_per_second",
    "train/flops",
    "train/mfu",
    "train/step_s",
    "train/data_wait_s",
    "train/loss_scale",
    "train/overflow_steps",
    "memory/host_gib",
    "memory/device_allocated_gib",
    "memory/device_peak_gib",
    "memory/device_reserved_gib",
    "eval/loss",
    "eval/perplexity",
    "eval/loss_tokens",
)
"""What lines of metrics.jsonl can hold; which of them depends on device, precision and evaluation."""


class MetricsWriter:
    """Appends to metrics.jsonl. A resumed run first drops the lines of steps that it takes again, so that each step
    stands there once."""

    def __init__(self, run_dir: Path, *, start_step: int) -> None:
        path = run_dir / METRICS_FILE
        kept = [line for line in read_metrics(run_dir) if line["step"] <= start_step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.rename(path)
        self._file = path.open("a", buffering=1)

    def write(self, step: int, figures: Mapping[str, float | int]) -> None:
        """One line; keys are `train/…`, `eval/…` or `memory/…`, and `time` in seconds since the epoch."""
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **figures}) + "\n")

    def close(self) -> None:
        """Flushes and closes the file."""
        self._file.close()


class EventsWriter:
    """Appends the phases of a run to events.jsonl, for whoever watches it."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / EVENTS_FILE

    def write(self, phase: str, **details: Any) -> None:
        """One line: what the run does from now on."""
        with self._path.open("a") as file:
            file.write(json.dumps({"phase": phase, "time": round(time.time(), 3), **details}) + "\n")


class Tail:
    """New complete lines of a JSONL file. One that was rewritten, as by a restarted run, is read from its start."""

    def __init__(self, path: Path, *, from_start: bool) -> None:
        self._path = path
        self._place, self._file = 0, 0
        if not from_start and path.is_file():
            status = path.stat()
            self._place, self._file = status.st_size, status.st_ino

    def read(self) -> list[dict[str, Any]]:
        """The lines that were written since the last call."""
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._file or status.st_size < self._place:
                    self._place, self._file = 0, status.st_ino
                file.seek(self._place)
                text = file.read()
        except FileNotFoundError:
            return []
        complete = text[: text.rfind(b"\n") + 1]
        self._place += len(complete)
        return [json.loads(line) for line in complete.splitlines()]


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
    newest.pop("time", None)
    return newest


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """The phases of a run in order; a last line cut off by a killed process is left out."""
    path = run_dir / EVENTS_FILE
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


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
