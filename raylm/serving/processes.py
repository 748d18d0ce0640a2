"""No process outlives the server: who was started meanwhile, and who of them has lost its parent."""

import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

logger = logging.getLogger(__name__)

_GRACE_S = 5.0
_POLL_S = 0.05
_LOOK_S = 0.25
_GCS = "gcs_server"
"""Ray's process that all others, and every call to Ray, need."""


class Descendants:
    """The processes below this one that began after the object was made."""

    def __init__(self) -> None:
        self._before = set(psutil.Process().children(recursive=True))
        self._seen: dict[psutil.Process, psutil.Process | None] = {}
        self._folders: list[str] = []
        self._watch: threading.Thread | None = None
        self._unwound = threading.Event()

    def note(self) -> None:
        """Remembers who runs now, and under which parent. After the parent's end nothing leads to them any more."""
        for process in set(psutil.Process().children(recursive=True)) - self._before:
            try:
                self._seen.setdefault(process, process.parent())
            except psutil.NoSuchProcess:
                continue

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Around a block that starts processes: notes them at its end, before they are told to stop."""
        try:
            yield
        finally:
            self.note()

    def note_folder(self, folder: str) -> None:
        """A folder that goes with the processes where they, and this one, end at once."""
        if folder:
            self._folders.append(folder)

    def end_with_ray(self, gcs_address: str, exit_code: int) -> None:
        """From now on, where this process has a Ray of its own, that one's end is this one's, a few seconds later.

        For a SIGTERM that has reached Ray as well, as systemd sends it to all processes of a unit: each call that the
        unwinding makes would wait a minute for Ray, whose core then ends this process with others still there.
        """
        own = any(_name(process) == _GCS for process in psutil.Process().children())
        self.note()
        if own and self._watch is None:
            self._watch = threading.Thread(target=self._follow, args=(gcs_address, exit_code), daemon=True)
            self._watch.start()

    def _follow(self, gcs_address: str, exit_code: int) -> None:
        # Asked at its port: on SIGTERM Ray 2.60's GCS closes that at once, and its process stays.
        while _listens(gcs_address):
            if self._unwound.wait(_LOOK_S):
                return
            self.note()
        deadline = time.monotonic() + _GRACE_S
        while time.monotonic() < deadline:
            self.note()
            if self._unwound.wait(_LOOK_S):
                return
        logger.warning("Ray has ended before the server: ending what is left of both")
        for process in self._running():
            with suppress(psutil.NoSuchProcess):
                process.suspend()  # or a proxy actor might still start a HAProxy that nobody has noted
        left = self._running()
        for process in left:
            _kill(process)
        _wait(left)
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(exit_code)  # the main thread waits for Ray, and cannot be told

    def _running(self) -> list[psutil.Process]:
        self.note()
        return [process for process in list(self._seen) if _runs(process)]

    def end_orphans(self) -> None:
        """Waits for the noted processes whose parent has ended, a few seconds at most, then kills them by their ids.

        Engine and HAProxy end by themselves when their replica or proxy actor did; this is for those that do not.
        """
        self._unwound.set()
        if self._watch is not None:
            self._watch.join()
        orphans = [process for process, parent in self._seen.items() if parent is None or not _runs(parent)]
        for process in _wait(orphans):
            logger.warning("killing process %d, which outlived the server", process.pid)
            _kill(process)
        _wait(orphans)


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def _listens(address: str) -> bool:
    """address: HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_GRACE_S).close()
    except OSError:
        return False
    return True


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
