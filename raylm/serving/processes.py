"""No process outlives the server: who was started meanwhile, and who of them has lost its parent."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

logger = logging.getLogger(__name__)

_GRACE_S = 5.0


class Descendants:
    """The processes below this one that began after the object was made."""

    def __init__(self) -> None:
        self._before = set(psutil.Process().children(recursive=True))
        self._seen: dict[psutil.Process, psutil.Process | None] = {}

    def note(self) -> None:
        """Remembers who runs now and under which parent: after the parent's end nothing leads to them any more."""
        for process in set(psutil.Process().children(recursive=True)) - self._before:
            try:
                self._seen[process] = process.parent()
            except psutil.NoSuchProcess:
                continue

    def end_orphans(self) -> None:
        """Waits for the noted processes whose parent has ended, a few seconds at most, then kills them by their ids.

        Engine and HAProxy end by themselves when their replica or proxy actor did; this is for those that do not.
        """
        orphans = [process for process, parent in self._seen.items() if parent is None or not parent.is_running()]
        _, lingering = psutil.wait_procs(orphans, timeout=_GRACE_S)
        for process in lingering:
            logger.warning("killing process %d, which outlived the server", process.pid)
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(lingering, timeout=_GRACE_S)


@contextmanager
def no_process_left() -> Iterator[Descendants]:
    """Around a Ray session: ends what the session left behind. The block calls `note()` before it shuts down."""
    descendants = Descendants()
    try:
        yield descendants
    finally:
        descendants.end_orphans()
