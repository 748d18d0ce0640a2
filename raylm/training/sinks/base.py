"""What a sink is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from raylm.config import TrainConfig
from raylm.config.metrics import MetricsSection

STATUSES = ("finished", "stopped", "failed")


@dataclass(frozen=True, slots=True)
class RunInfo:
    """A run as trackers list it. dir: the run directory."""

    dir: Path
    config: TrainConfig

    @property
    def name(self) -> str:
        """What the run is called."""
        return self.section.run_name or self.dir.name

    @property
    def section(self) -> MetricsSection:
        """The settings of all sinks."""
        return self.config.metrics


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of one step. time: when they were measured, in seconds since the epoch."""

    step: int
    time: float
    values: Mapping[str, float]


class Sink(Protocol):
    """Where figures are sent. Any error that a method raises means: not now; the caller warns and tries again."""

    def __init__(self, info: RunInfo) -> None: ...

    @staticmethod
    def check(section: MetricsSection) -> None:
        """Raises ConfigError for what can be known to be missing before a run starts. Without network."""
        ...

    @property
    def place(self) -> str:
        """Where runs of this configuration are listed, without credentials: a run's id counts only there."""
        ...

    def open(self, run_id: str | None) -> str:
        """Connects and returns the id of the run: a new one, or the given one when it can be gone on with."""
        ...

    def write(self, lines: Sequence[Figures]) -> None:
        """Takes figures, in order of steps; a step may come in several parts."""
        ...

    def close(self, status: str) -> None:
        """Ends the run with one of STATUSES."""
        ...
