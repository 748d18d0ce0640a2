"""Finds a rank that is stuck: each writes down what it is doing, and looks at the others when it gets no further.

A collective that one rank does not join keeps all others waiting, and says nothing of which. So each rank has a file in
the run directory, `ranks/00003.json`, that a thread renews: what the rank does, how far it is, and that its process
runs at all. A rank that has not moved for `timeout` seconds names those that are behind, and ends its process; Ray
Train then restarts the workers from the newest checkpoint, up to `cluster.max_failures` times.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

EXIT_CODE = 75
"""Of a process that ended because some rank is stuck (EX_TEMPFAIL)."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A rank's sign of life. progress: counts what it has done; renewed_s: when its thread last ran, Unix time."""

    rank: int
    progress: int
    doing: str
    renewed_s: float
    host: str
    pid: int


class Pulse:
    """One rank's. `beat` costs nothing; the thread writes a few times a timeout."""

    def __init__(
        self, folder: Path, *, rank: int, world_size: int, timeout_s: float, give_up: Callable[[str], None]
    ) -> None:
        """give_up: called in the thread with what was found, when this rank has not moved for timeout_s."""
        self._folder, self._rank, self._world_size = folder, rank, world_size
        self._timeout_s, self._give_up = timeout_s, give_up
        self._interval_s = min(5.0, timeout_s / 5)
        self._progress, self._doing = 0, "starts"
        self._moved_at = time.monotonic()
        self._stop = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        self._write()
        self._thread = threading.Thread(target=self._watch, name="raylm-pulse", daemon=True)
        self._thread.start()

    def beat(self, doing: str) -> None:
        """This rank is about to do something that ends within the timeout."""
        self._progress += 1
        self._doing = doing
        self._moved_at = time.monotonic()

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._write()
            if time.monotonic() - self._moved_at > self._timeout_s:
                self._give_up(diagnosis(read_marks(self._folder, self._world_size), self._timeout_s))
                return

    def _write(self) -> None:
        mark = Mark(self._rank, self._progress, self._doing, time.time(), socket.gethostname(), os.getpid())
        target = self._folder / f"{self._rank:05d}.json"
        try:
            target.with_suffix(".partial").write_text(json.dumps(asdict(mark)))
            target.with_suffix(".partial").rename(target)
        except OSError as error:  # a full disk is the checkpoint's to report
            logger.warning("no sign of life can be written: %s", error)


def read_marks(folder: Path, world_size: int) -> list[Mark | None]:
    """The marks of all ranks; None for one that has none that can be read."""
    marks: list[Mark | None] = []
    for rank in range(world_size):
        try:
            marks.append(Mark(**json.loads((folder / f"{rank:05d}.json").read_text())))
        except (OSError, ValueError, TypeError):
            marks.append(None)
    return marks


def diagnosis(marks: list[Mark | None], timeout_s: float) -> str:
    """Which ranks hold the others up: those whose process no longer runs, else those that have done the least."""
    now, silent_s = time.time(), max(10.0, timeout_s / 2)
    found = [mark for mark in marks if mark is not None]
    silent = [mark for mark in found if now - mark.renewed_s > silent_s]
    least = min((mark.progress for mark in found), default=0)
    behind = silent or [mark for mark in found if mark.progress == least]
    lines = [f"rank {rank} gave no sign of life at all" for rank, mark in enumerate(marks) if mark is None]
    for mark in behind:
        state = f"; its process has not run for {now - mark.renewed_s:.0f} s" if mark in silent else ""
        lines.append(f"rank {mark.rank} (process {mark.pid} on {mark.host}) is stuck: it {mark.doing}{state}")
    others = sorted({mark.doing for mark in found if mark not in behind})
    waiting = f". The others wait: {'; '.join(others)}" if others else ""
    return f"nothing has moved for {timeout_s:.0f} s; {', '.join(lines)}{waiting}"
