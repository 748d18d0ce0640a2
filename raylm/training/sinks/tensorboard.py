"""TensorBoard event files in the run directory."""

from collections.abc import Sequence
from typing import Any

from raylm.config.metrics import MetricsSection
from raylm.training.sinks.base import Figures, RunInfo

FOLDER = "tensorboard"


class TensorboardSink:
    """See Sink."""

    def __init__(self, info: RunInfo) -> None:
        self._info = info
        self._writer: Any = None

    @staticmethod
    def check(section: MetricsSection) -> None:
        """Nothing can be missing."""

    @property
    def place(self) -> str:
        """See Sink."""
        return FOLDER

    def open(self, run_id: str | None) -> str:
        """See Sink."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._info.dir / FOLDER))
        return FOLDER

    def write(self, lines: Sequence[Figures]) -> None:
        """See Sink."""
        for line in lines:
            for name, value in line.values.items():
                self._writer.add_scalar(name, value, line.step, walltime=line.time)
        self._writer.flush()

    def close(self, status: str) -> None:
        """See Sink."""
        self._writer.close()
