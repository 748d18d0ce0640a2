"""A torch profiler trace of some steps of a rank, for chrome://tracing or Perfetto."""

import contextlib
from pathlib import Path
from typing import Any

import torch


class StepProfiler:
    """Records from the beginning of step `first` to the end of step `last` (both from 1, as in metrics.jsonl)."""

    def __init__(self, target: Path, first: int, last: int, device: torch.device) -> None:
        """target: the JSON file; its folder is made."""
        self._target, self._first, self._last = target, first, last
        self._activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            self._activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._running: Any = None

    def before_step(self, step: int) -> None:
        """step: from 0, as the loop counts. A run that resumes within the steps records what is left of them."""
        if self._running is None and self._first <= step + 1 <= self._last:
            self._running = torch.profiler.profile(activities=self._activities, record_shapes=True, profile_memory=True)
            self._running.start()

    def step_done(self, step: int) -> None:
        """step: from 1. Writes the trace after the last one."""
        if self._running is not None and step >= self._last:
            self._write()

    def close(self) -> None:
        """Writes what there is when the run ends earlier."""
        if self._running is not None:
            with contextlib.suppress(OSError):
                self._write()

    def _write(self) -> None:
        profiler, self._running = self._running, None
        profiler.stop()
        self._target.parent.mkdir(parents=True, exist_ok=True)
        partial = self._target.with_suffix(".partial.json")
        profiler.export_chrome_trace(str(partial))
        partial.rename(self._target)
