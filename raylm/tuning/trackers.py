"""Sends the figures of trials to the sinks of their configuration, from the driver, as a single run does.

Each trial is a run of its own there, in the group of the sweep. Credentials stay with the driver.
"""

import logging
import threading
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from raylm.config import TrainConfig
from raylm.training.sinks.follow import Following, send_figures

logger = logging.getLogger(__name__)


class _Failed(Exception):
    """Tells the sinks that a run failed."""


class Trackers:
    """The sinks of the trials that run."""

    def __init__(self) -> None:
        self._open: dict[int, AbstractContextManager[Following]] = {}
        self._followed: dict[int, Following] = {}
        self._closing: list[threading.Thread] = []

    def start(self, number: int, config: TrainConfig) -> None:
        """A trial starts, or goes on."""
        if config.metrics.sinks and number not in self._open:
            self._open[number] = send_figures(config, Path(config.run.dir))
            self._followed[number] = self._open[number].__enter__()

    def failure(self, number: int) -> str | None:
        """Why a trial was asked to stop, with `metrics.on_sink_failure=stop`."""
        return self._followed[number].failure if number in self._followed else None

    def end(self, number: int, *, failed: bool) -> None:
        """A trial has ended; what the sinks lack of it is sent meanwhile."""
        sinks = self._open.pop(number, None)
        if sinks is not None:
            thread = threading.Thread(target=_close, args=(sinks, failed), name=f"raylm-trackers-{number}")
            thread.start()
            self._closing.append(thread)

    def close(self) -> dict[int, dict[str, str]]:
        """Until all sinks have what they take; trials that did not end are told to go on later. Returns what was not
        taken: by trial, the sinks and what each said."""
        for number in list(self._open):
            self.end(number, failed=False)
        for thread in self._closing:
            thread.join()
        return {number: found.lacking for number, found in sorted(self._followed.items()) if found.lacking}


def _close(sinks: AbstractContextManager[Any], failed: bool) -> None:
    with suppress(_Failed):
        if failed:
            sinks.__exit__(_Failed, _Failed(), None)
        else:
            sinks.__exit__(None, None, None)
