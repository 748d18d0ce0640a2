"""Shows a run while it goes on: a bar in a terminal, a line now and then elsewhere.

The workers may be on other machines, so what is shown is read from the run directory: events.jsonl and metrics.jsonl.
"""

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from raylm.training.metrics import EVENTS_FILE, METRICS_FILE, Tail

logger = logging.getLogger(__name__)

POLL_S = 0.5
LINE_INTERVAL_S = 10.0


@contextmanager
def watch_run(run_dir: Path, stream: TextIO | None = None) -> Iterator[None]:
    """Shows the progress of the run on stderr for the length of the block."""
    stream = stream or sys.stderr
    shown = _Bar(stream) if stream.isatty() else _Lines()
    stop = threading.Event()
    tails = [Tail(run_dir / name, from_start=False) for name in (EVENTS_FILE, METRICS_FILE)]

    def follow() -> None:
        while True:
            last_round = stop.wait(POLL_S)
            for event in tails[0].read():
                shown.phase(event)
            for line in tails[1].read():
                shown.step(line)
            if last_round:
                return

    thread = threading.Thread(target=follow, name="raylm-progress", daemon=True)
    thread.start()
    try:
        with log_above(stream):
            yield
    finally:
        stop.set()
        thread.join()
        shown.close()


@contextmanager
def log_above(stream: TextIO) -> Iterator[None]:
    """What is logged to `stream` goes where sys.stderr goes meanwhile: to what is drawn there, which makes room for
    lines. Written to the terminal itself they would stand in the middle of it."""
    streams = (handler for handler in logging.root.handlers if isinstance(handler, logging.StreamHandler))
    handlers = [handler for handler in streams if handler.stream is stream]
    for handler in handlers:
        handler.setStream(sys.stderr)
    try:
        yield
    finally:
        for handler in handlers:
            handler.setStream(stream)


class _Lines:
    """For logs: each phase, and a step at most every LINE_INTERVAL_S."""

    def __init__(self) -> None:
        self._num_steps, self._from = 0, 0
        self._shown_at = 0.0
        self._phase = ""

    def phase(self, event: dict[str, Any]) -> None:
        if event.get("num_steps"):
            self._num_steps = event["num_steps"]
        if "workers" in event:  # they begin here; lines before are of a former start
            self._from = event["step"]
        if event["phase"] != self._phase:
            self._phase = event["phase"]
            logger.info("%s%s", self._phase, f" (step {event['step']})" if event.get("step") else "")

    def step(self, line: dict[str, Any]) -> None:
        done = line["step"] == self._num_steps
        if "train/loss" not in line or not self._from < line["step"] <= self._num_steps:
            return
        if (time.monotonic() - self._shown_at < LINE_INTERVAL_S) and not done:
            return
        self._shown_at = time.monotonic()
        logger.info("%s", describe_step(line, self._num_steps))

    def close(self) -> None:
        pass


class _Bar:
    """For people: one line with phase, bar, figures and time left."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<18}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(file=stream),
        )
        self._progress.start()
        self._task = self._progress.add_task("starting", total=None, figures="")

    def phase(self, event: dict[str, Any]) -> None:
        if event.get("num_steps"):
            self._progress.update(self._task, total=event["num_steps"], completed=event["step"])
        self._progress.update(self._task, description=event["phase"])

    def step(self, line: dict[str, Any]) -> None:
        if "train/loss" in line:
            figures = f"loss {line['train/loss']:.3f}  {line['train/tokens_per_second']:.0f} tokens/s"
            self._progress.update(self._task, completed=line["step"], figures=figures)

    def close(self) -> None:
        self._progress.stop()


def describe_step(line: dict[str, Any], num_steps: int) -> str:
    """One step in a line: loss, gradient norm, learning rate, tokens/s, MFU, memory, time left."""
    left = (num_steps - line["step"]) * line["train/step_s"]
    norm = line.get("train/grad_norm", float("inf"))  # not there where an fp16 step was passed over
    return (
        f"step {line['step']}/{num_steps}  loss {line['train/loss']:.4f}  grad_norm {norm:.3f}  "
        f"learning_rate {line['train/learning_rate']:.2e}  {line['train/tokens_per_second']:.0f} tokens/s  "
        f"mfu {line['train/mfu']:.2f}  {line['memory/host_gib']:.1f} GiB  {left:.0f} s left"
    )
