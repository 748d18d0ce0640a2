"""What a worker is given, and how it says that it stopped for something the user can mend. Plain values."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylm.config import TrainConfig
from raylm.data.stream import MicroBatch
from raylm.training.run_dir import RunDir


@dataclass(frozen=True, slots=True)
class WorkerJob:
    """All a worker needs to know, as plain values. steps_per_epoch: global batches of each epoch."""

    config: TrainConfig
    run: RunDir
    num_steps: int
    steps_per_epoch: tuple[int, ...]
    identity: dict[str, Any]
    start_from: Path | None
    deadline: float | None = None
    """When to stop, in seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class WorkerData:
    """A worker's share of the data. train: micro-batches from the start step on; evaluation: a fresh pass each call."""

    train: Callable[[], Iterable[MicroBatch]]
    evaluation: Callable[[], Iterable[MicroBatch]] | None


def write_failure(run: RunDir, error: Exception) -> None:
    """Notes an error the user can mend, for the driver to raise; the first one stays."""
    if not run.failure.exists():
        run.failure.write_text(json.dumps({"kind": type(error).__name__, "arguments": list(error.args)}))
