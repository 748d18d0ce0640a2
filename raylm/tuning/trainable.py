"""A trial as Ray Tune sees it. Only this file and tune_run.py know Ray Tune.

A class, because a trainable that is a function cannot wait for its workers to end when it is stopped: Tune gives it no
time, and its GPU would still be taken when the next trial starts.
"""

from pathlib import Path
from typing import Any

from ray.tune import Trainable

from raylm.errors import ClusterError, RaylmError
from raylm.tuning.plans import PLANS_FOLDER, SweepJob, failure_file, progress, read_plan
from raylm.tuning.running import RunningTrial, failure_reason


class TrialFailed(Exception):
    """What a trial ended with, without the traceback of the processes it came through."""


class SweepTrial(Trainable):
    """Each step is one report of the training, which starts with the first one."""

    def setup(self, config: dict[str, Any], job: SweepJob | None = None) -> None:
        """config: the number of the trial."""
        assert job is not None
        if not (Path(job.sweep_dir) / PLANS_FOLDER).is_dir():
            raise ClusterError(
                job.sweep_dir, "is not visible on the head node of the cluster.", "Set dir to shared storage."
            )
        self._job = job
        self._forget(config)

    def _forget(self, config: dict[str, Any]) -> None:
        self._number = int(config["number"])
        self._running: RunningTrial | None = None
        self._rewind_to: int | None = None
        self._step = 0

    def step(self) -> dict[str, Any]:
        """The next report."""
        folder = Path(self._job.sweep_dir)
        try:
            if self._running is None:
                self._running = RunningTrial(read_plan(folder, self._number), self._job, rewind_to=self._rewind_to)
            found = self._running.next_report()
        except Exception as error:
            failure_file(folder, self._number).write_text(failure_reason(error))
            raise TrialFailed(failure_reason(error)) from (error if not isinstance(error, RaylmError) else None)
        self._step = found.step
        return {
            "step": found.step,
            "value": found.value,
            "tokens": found.tokens,
            "seconds": found.seconds,
            "figures": found.figures,
            "num_steps": found.num_steps,
            "step_tokens": found.step_tokens,
            "progress": progress(found.step, found.step_tokens, self._job.unit),
            "is_new": found.is_new,
            "ended": found.is_last,
            "done": found.is_last,
        }

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Where the trial is; its checkpoint is pinned already."""
        return {"number": self._number, "step": self._step}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """A paused trial goes back to the step it reported last. What population based training copies from another
        trial lies in a folder already."""
        if checkpoint and checkpoint["number"] == self._number and checkpoint["step"]:
            self._rewind_to = checkpoint["step"]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The process goes on with another trial."""
        self.cleanup()
        self._forget(new_config)
        return True

    def cleanup(self) -> None:
        """Ends the training and waits until it has freed what it holds."""
        if self._running is not None:
            running, self._running = self._running, None
            running.stop()
