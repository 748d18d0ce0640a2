"""Ends of a run before its last step: a time limit, a request from outside, an evaluation that no longer improves.

Rank 0 looks at the clock and at the file that asks for an end; what it finds is told to all ranks with each step, so
all stop after the same one. What the evaluations say is the same on every rank.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Any

STOP_FILE = "stop"
HOLD_FILE = "hold"
"""Holds a step: whoever runs the training has something to decide before it goes beyond."""
_HOLD_POLL_S = 0.05


class Stop(IntEnum):
    """Why a run ends before its last step."""

    NOT = 0
    TIME_LIMIT = 1
    REQUESTED = 2
    NO_IMPROVEMENT = 3
    SAVE = 4
    """Not an end: a checkpoint after this step, because a node is about to be taken away."""


DESCRIPTIONS = {
    Stop.TIME_LIMIT: "training.max_time_s is over",
    Stop.REQUESTED: "it was asked to stop",
    Stop.NO_IMPROVEMENT: "the evaluation no longer improves",
}


class Patience:
    """Counts evaluations that were not better than the best one before them."""

    def __init__(self, limit: int | None, former: Sequence[float] = ()) -> None:
        """limit: evaluations without improvement that end a run, None for never; former: losses of a resumed run."""
        self._limit, self._best, self._worse = limit, float("inf"), 0
        for loss in former:
            self.is_over(loss)

    def is_over(self, loss: float) -> bool:
        """Takes the loss of an evaluation in; True when it was one too many."""
        self._worse = 0 if loss < self._best else self._worse + 1
        self._best = min(self._best, loss)
        return self._limit is not None and self._worse >= self._limit


class Watch:
    """What rank 0 looks at before each step."""

    def __init__(
        self, run_dir: Path, deadline: float | None, node_goes_away: Callable[[], bool] = lambda: False
    ) -> None:
        """deadline: in seconds since the epoch. node_goes_away: whether a node of this run has notice to quit."""
        self._file, self._deadline = run_dir / STOP_FILE, deadline
        self._node_goes_away, self._saved = node_goes_away, False
        self._hold = run_dir / HOLD_FILE

    def reason(self, step: int = 0, alive: Callable[[str], None] = lambda doing: None) -> Stop:
        """Whether the run should end after the step at hand. step: steps done; waits while they are held.

        alive: is told now and then while it waits.
        """
        while step >= held_step(self._hold.parent) and not self._file.exists():
            alive(f"is held at step {step}")
            time.sleep(_HOLD_POLL_S)
        if self._file.exists():
            return Stop.REQUESTED
        if self._deadline is not None and time.time() >= self._deadline:
            return Stop.TIME_LIMIT
        if not self._saved and self._node_goes_away():
            self._saved = True
            return Stop.SAVE
        return Stop.NOT


def held_step(run_dir: Path) -> float:
    """The step that a run may not go beyond; infinite where it is not held."""
    try:
        return int((run_dir / HOLD_FILE).read_text())
    except FileNotFoundError:
        return float("inf")


def hold(run_dir: Path, step: int | None) -> None:
    """Lets a run take steps up to this one and no more; None lets it go."""
    path = run_dir / HOLD_FILE
    if step is None:
        path.unlink(missing_ok=True)
        return
    partial = path.with_suffix(".partial")
    partial.write_text(str(step))
    partial.rename(path)


@contextmanager
def stop_on_sigterm(run_dir: Path) -> Iterator[None]:
    """While the block runs, SIGTERM asks the run to stop after the step at hand; a second one ends the process. What a
    former driver asked of the run is forgotten.

    Only the main thread can take signals; elsewhere nothing changes.
    """
    (run_dir / STOP_FILE).unlink(missing_ok=True)
    hold(run_dir, None)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.getsignal(signal.SIGTERM)

    def ask(number: int, frame: Any) -> None:
        (run_dir / STOP_FILE).touch()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former or signal.SIG_DFL)
