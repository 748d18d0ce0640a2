"""No process outlives the server: who was started meanwhile, and who of them has lost its parent."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

logger = logging.getLogger(__name__)

_GRACE_S = 5.0
_POLL_S = 0.05


class Descendants:
    """The processes below this one that began after the object was made."""

    def __init__(self) -> None:
        self._before = set(psutil.Process().children(recursive=True))
        self._seen: dict[psutil.Process, psutil.Process | None] = {}

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Around a block that starts processes: at its end, before they are told to stop, remembers who runs, and under
        which parent. After the parent's end nothing leads to them any more."""
        try:
            yield
        finally:
            for process in set(psutil.Process().children(recursive=True)) - self._before:
                try:
                    self._seen.setdefault(process, process.parent())
                except psutil.NoSuchProcess:
                    continue

    def end_orphans(self) -> None:
        """Waits for the noted processes whose parent has ended, a few seconds at most, then kills them by their ids.

        Engine and HAProxy end by themselves when their replica or proxy actor did; this is for those that do not.
        """
        orphans = [process for process, parent in self._seen.items() if parent is None or not _runs(parent)]
        for process in _wait(orphans):
            logger.warning("killing process %d, which outlived the server", process.pid)
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        _wait(orphans)


def _wait(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run after a few seconds."""
    deadline = time.monotonic() + _GRACE_S
    while (running := [process for process in processes if _runs(process)]) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return running


def _runs(process: psutil.Process) -> bool:
    """A zombie has ended: it waits for its new parent, which in a container may never look."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def no_process_left() -> Iterator[Descendants]:
    """Around a Ray session: ends what the session left behind. `noted()` says when to look."""
    descendants = Descendants()
    try:
        yield descendants
    finally:
        descendants.end_orphans()
