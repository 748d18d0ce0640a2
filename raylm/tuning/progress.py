"""Shows a sweep while it goes on: a table in a terminal, a line now and then elsewhere.

Where trials are between two reports is read from their run directories, as the progress of a single run is.
"""

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from raylm.training.metrics import METRICS_FILE, Tail, read_events
from raylm.training.progress import log_above
from raylm.tuning.journal import ENDED, Trial
from raylm.tuning.space import described
from raylm.words import counted

if TYPE_CHECKING:
    from raylm.tuning.session import Session

logger = logging.getLogger(__name__)

POLL_S = 0.5
LINE_INTERVAL_S, LONGEST_INTERVAL_S = 15.0, 120.0
_MOST_ROWS = 20


@contextmanager
def watch_sweep(session: "Session", stream: TextIO | None = None) -> Iterator[None]:
    """Shows the sweep on stderr for the length of the block."""
    stream = stream or sys.stderr
    shown = _Table(stream) if stream.isatty() else _Lines()
    stop = threading.Event()
    view = SweepView(session)

    def follow() -> None:
        while not stop.wait(POLL_S):
            with suppress(RuntimeError):  # a trial was added while the table was made
                shown.show(view)

    thread = threading.Thread(target=follow, name="raylm-sweep-progress", daemon=True)
    thread.start()
    try:
        with log_above(stream):
            yield
    finally:
        stop.set()
        thread.join()
        shown.close(view)


class SweepView:
    """What there is to see of a sweep."""

    def __init__(self, session: "Session") -> None:
        self._session = session
        self._tails: dict[int, tuple[Tail, dict[str, Any]]] = {}

    def rows(self) -> list[tuple[str, str, str, str, str, str]]:
        """Trial, settings, state, step, best value and time left: running ones first, then the best of the others."""
        mode, state = self._session.config.mode, self._session.state
        trials = list(state.trials.values())
        running = [trial for trial in trials if trial.state == "running"]
        others = [trial for trial in trials if trial.state != "running"]
        sign = 1 if mode == "min" else -1
        others.sort(key=lambda trial: sign * best.value if (best := trial.best(mode)) else float("inf"))
        return [self._row(trial, mode) for trial in [*running, *others][:_MOST_ROWS]]

    def _row(self, trial: Trial, mode: str) -> tuple[str, str, str, str, str, str]:
        best, step, left = trial.best(mode), trial.last.step if trial.last else 0, ""
        if trial.state == "running":
            line = self._newest(trial.number)
            step = max(step, int(line.get("step", 0)))
            if trial.num_steps and "train/step_s" in line:
                left = _clock((trial.num_steps - step) * line["train/step_s"])
        of = f"{step}/{trial.num_steps}" if trial.num_steps else str(step)
        state = trial.state if trial.state != "running" or step else self._phase(trial.number)
        value = f"{best.value:.4g}" if best else ""
        return str(trial.number), described(trial.settings), state, of, value, left

    def _newest(self, number: int) -> dict[str, Any]:
        if number not in self._tails:
            path = self._folder(number) / METRICS_FILE
            self._tails[number] = Tail(path, from_start=True), {}
        tail, newest = self._tails[number]
        for line in tail.read():
            newest.update(line)
        return newest

    def _phase(self, number: int) -> str:
        events = read_events(self._folder(number))
        return str(events[-1]["phase"]) if events else "starting its workers"

    def _folder(self, number: int) -> Path:
        return self._session.trial_dir(number)

    def summary(self) -> str:
        """Trials by state, the best, and the time the rest may take."""
        session = self._session
        states = [trial.state for trial in session.state.trials.values()]
        parts = [f"{states.count(name)} {name}" for name in dict.fromkeys(sorted(states))]
        total = session.num_trials
        head = f"{len(states)} of {counted(total, 'trial')}" if total else counted(len(states), "trial")
        best = session.state.best(session.config.mode)
        shown = f"; best {best[1].value:.4g} (trial {best[0].number}, step {best[1].step})" if best else ""
        left = self._left()
        return f"{head}: {', '.join(parts) or 'none yet'}{shown}{f'; about {left} left' if left else ''}"

    def _left(self) -> str:
        """By the trials that have ended in this session so far; nothing is said before the first."""
        session = self._session
        done = session.ended_here
        if not done or session.num_trials is None:
            return ""
        open_trials = session.num_trials - sum(trial.has_ended for trial in session.state.trials.values())
        if not open_trials:
            return ""
        limit = session.config.budget.time_s
        seconds = open_trials * session.seconds_here / done
        return _clock(seconds if limit is None else min(seconds, max(0.0, limit - session.seconds)))


class _Lines:
    """For logs: where the trials are that run, after LINE_INTERVAL_S and at ever longer intervals, if anything has
    changed; starts and ends are logged as they happen."""

    def __init__(self) -> None:
        self._shown_at, self._pause = time.monotonic(), LINE_INTERVAL_S
        self._shown: list[tuple[str, ...]] = []

    def show(self, view: SweepView) -> None:
        if time.monotonic() - self._shown_at < self._pause:
            return
        rows = [row for row in view.rows() if row[2] not in ENDED]
        if [row[:5] for row in rows] == self._shown:
            return
        self._shown_at, self._shown = time.monotonic(), [row[:5] for row in rows]
        self._pause = min(2 * self._pause, LONGEST_INTERVAL_S)
        logger.info("%s", view.summary())
        for number, settings, state, step, value, left in rows:
            began = int(step.partition("/")[0]) > 0
            figures = [f"{state}, step {step}" if began else state, value and f"best {value}", left and f"{left} left"]
            logger.info("  trial %s: %s (%s)", number, ", ".join(filter(None, figures)), settings)

    def close(self, view: SweepView) -> None:
        logger.info("%s", view.summary())


class _Table:
    """For people: a table that is drawn again."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self._live = Live(console=Console(file=stream), auto_refresh=False)
        self._live.start()

    def show(self, view: SweepView) -> None:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None)
        for heading in ("trial", "settings", "state", "step", "best", "left"):
            table.add_column(heading, overflow="fold")
        for row in view.rows():
            table.add_row(*row)
        self._live.update(Group(Text(view.summary()), table), refresh=True)

    def close(self, view: SweepView) -> None:
        self.show(view)
        self._live.stop()


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole} s" if whole < 120 else f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
