"""One trial while it runs, in a process of its own beside the workers: starts the ordinary training on Ray Train, reads
what it writes, and lets it on from report to report.

The training is held at each step that is reported (training/stopping.py): it goes on when the report has been answered,
so a scheduler's decision is about the step it is made for, however short steps are.
"""

import math
import os
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raylm.config import TrainConfig
from raylm.errors import RaylmError, TrainingError
from raylm.training.checkpoint import checkpoint_name, list_checkpoints, newest_checkpoint, read_meta, remove_checkpoint
from raylm.training.metrics import METRICS_FILE, EventsWriter, Tail
from raylm.training.run_dir import RunDir, open_run_dir
from raylm.training.stopping import STOP_FILE, hold
from raylm.tuning.candidates import MEMORY, TIME
from raylm.tuning.pins import link_checkpoint, pin, pin_path
from raylm.tuning.plans import SweepJob, TrialPlan, copy_folder, data_key

POLL_S = 0.05
STOPPING_S = 600.0
"""A training that is told to end does so after the step at hand. Ray ends a trial's process after this time too."""


@dataclass(frozen=True, slots=True)
class Progress:
    """A report. step_tokens: of a step on average; is_last: the training has ended by itself; is_new: it has a step
    that was not reported before."""

    step: int
    value: float
    tokens: int
    seconds: float
    figures: dict[str, float]
    num_steps: int
    step_tokens: float
    is_last: bool
    is_new: bool = True


class RunningTrial:
    """Starts when it is made."""

    def __init__(self, plan: TrialPlan, job: SweepJob, *, rewind_to: int | None = None) -> None:
        """rewind_to: step to go on from, where checkpoints are newer, of a trial that was paused."""
        self._plan, self._sweep_dir = plan, Path(job.sweep_dir)
        self._job, self._rewind_to = job, rewind_to
        self._config = self._started_config()
        self._run = open_run_dir(self._config)
        (self._run.path / STOP_FILE).unlink(missing_ok=True)
        self._figures = _Figures(self._run.path, plan)
        self._reported = plan.reported if rewind_to is None else rewind_to
        self._newest: Progress | None = None
        self._num_steps: int | None = None
        self._step_tokens = 0.0
        self._error: BaseException | None = None
        self._hold_at(self._reported)
        self._thread = threading.Thread(target=self._train, name="raylm-trial", daemon=True)
        self._thread.start()

    def next_report(self) -> Progress:
        """Waits for the next report, letting the training go on to it. Raises what the training ended with."""
        if self._newest is not None:
            self._hold_at(self._newest.step)
        while True:
            alive = self._thread.is_alive()
            if not alive and self._error is not None:
                raise self._error
            if alive and self._num_steps is None:  # what a former start left is told when its end is known
                time.sleep(POLL_S)
                continue
            self._figures.read()
            step = self._figures.next_step(self._reported, self._num_steps, ended=not alive)
            if step is not None and (step == self._num_steps or not self._is_saved(step)):
                step = step if not alive and self._is_saved(step) else None
            if step is not None:
                return self._report(step, is_last=not alive)
            if not alive:
                return self._ended()
            time.sleep(POLL_S)

    def stop(self) -> None:
        """Ends the training after the step at hand. Raises TrainingError where it does not end."""
        (self._run.path / STOP_FILE).touch()
        self._thread.join(STOPPING_S)
        if self._thread.is_alive():
            raise TrainingError(str(self._run.path), f"the training did not end within {STOPPING_S:g} s.")

    def _started_config(self) -> TrainConfig:
        """Goes on from its checkpoint if it has one; else what a former start left is deleted."""
        config = self._plan.config
        run = RunDir(Path(config.run.dir))
        if self._rewind_to is not None:
            kept = run.checkpoints / checkpoint_name(self._rewind_to)
            pinned = pin_path(run.path, self._rewind_to)
            if not kept.is_dir() and pinned.is_dir():
                link_checkpoint(pinned, kept)
            for path in list_checkpoints(run.checkpoints):
                if path.name > kept.name:
                    remove_checkpoint(path)
        goes_on = (
            newest_checkpoint(run.checkpoints) is not None or copy_folder(self._sweep_dir, self._plan.number).is_dir()
        )
        update = {"training": config.training.model_copy(update={"resume": "auto" if goes_on else None})}
        if not goes_on:
            update["run"] = config.run.model_copy(update={"overwrite": True})  # type: ignore[assignment]
        return config.model_copy(update=update)

    def _hold_at(self, step: int) -> None:
        interval = self._plan.interval
        hold(self._run.path, None if interval is None else (step // interval + 1) * interval)

    def _train(self) -> None:
        try:
            self._train_on_ray()
        except BaseException as error:  # handed to whoever waits for the report
            self._error = error

    def _train_on_ray(self) -> None:
        import ray

        from raylm.training.datasets import order_of
        from raylm.training.ray_trainer import Resources, TrainData, fit
        from raylm.training.run import identity_of, make_job

        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # trials are short
        config, run = self._config, self._run
        deadline = None if config.training.max_time_s is None else time.time() + config.training.max_time_s
        data = self._job.data.get(data_key(config)) or self._prepare_alone()
        copied = copy_folder(self._sweep_dir, self._plan.number)
        for source in list_checkpoints(copied):
            for path in run.checkpoints.glob("step-*"):
                remove_checkpoint(path)
            link_checkpoint(source, run.checkpoints / source.name, identity_of(config, data))
            remove_checkpoint(source)
        if copied.is_dir():
            copied.rmdir()
        plan = order_of(config, data.store.lengths, data.store.weights)
        job = replace(make_job(config, run, data, plan), deadline=deadline)
        self._step_tokens = plan.tokens_per_step(data.store.lengths)
        self._num_steps = plan.num_steps
        resources = Resources(**self._plan.resources)
        fit(job, TrainData(ray.put(data.store), ray.put(plan), data.evaluation), resources)
        reason = {"reason": run.stopped.read_text()} if run.stopped.is_file() else {}
        EventsWriter(run.path).write("stopped" if reason else "done", **reason)
        hold(run.path, None)

    def _prepare_alone(self) -> Any:
        """Data that no other trial was known to need; the cache has them for the next."""
        from raylm.training.before_start import check_before_start
        from raylm.training.datasets import prepare_data

        return prepare_data(self._config, check_before_start(self._config), self._run.path)

    def _is_saved(self, step: int) -> bool:
        return (self._run.checkpoints / checkpoint_name(step)).is_dir()

    def _report(self, step: int, *, is_last: bool) -> Progress:
        found = self._figures.at(step)
        value = found[self._plan.metric]
        if not math.isfinite(value):
            raise TrainingError(f"step {step}", f"{self._plan.metric} is {value}.")
        if self._is_saved(step):
            pin(self._run.path, self._run.checkpoints / checkpoint_name(step), step, value, self._plan.mode)
        self._reported = step
        tokens, seconds = self._figures.totals(step)
        assert self._num_steps is not None
        self._newest = Progress(step, value, tokens, seconds, found, self._num_steps, self._step_tokens, is_last)
        return self._newest

    def _ended(self) -> Progress:
        """The training has ended without anything new since the last report, or without any."""
        if self._newest is None and (former := self._figures.last_step(self._reported)) is not None:
            self._report(former, is_last=True)
        if self._newest is None:
            newest = newest_checkpoint(self._run.checkpoints)
            step = read_meta(newest).step if newest else 0
            raise TrainingError(f"step {step}", f"the training ended without {self._plan.metric}.")
        return replace(self._newest, is_last=True, is_new=False)


class _Figures:
    """What a run has written of its steps so far."""

    def __init__(self, run_dir: Path, plan: TrialPlan) -> None:
        self._tail = Tail(run_dir / METRICS_FILE, from_start=True)
        self._plan, self._lines = plan, dict[int, dict[str, Any]]()
        self._every = plan.config.metrics.log_interval_steps

    def read(self) -> None:
        for line in self._tail.read():
            self._lines[line["step"]] = {**self._lines.get(line["step"], {}), **line}

    def next_step(self, reported: int, num_steps: int | None, *, ended: bool) -> int | None:
        """The first step after `reported` that is to be reported and has its metric."""
        interval = self._plan.interval
        for step in sorted(self._lines):
            due = step == num_steps or (interval is not None and step % interval == 0)
            if step > reported and due and self._known(step):
                return step
        return self.last_step(reported, after=True) if ended else None

    def last_step(self, reported: int, *, after: bool = False) -> int | None:
        """The newest step with the metric; after: only beyond `reported`."""
        found = [step for step in self._lines if self._known(step) and (step > reported or not after)]
        return max(found, default=None)

    def _known(self, step: int) -> bool:
        metric = self._plan.metric
        return metric in (TIME, MEMORY) or metric in self._lines[step]

    def at(self, step: int) -> dict[str, float]:
        """The figures of a step, and those that are of all steps up to it."""
        line = {key: value for key, value in self._lines[step].items() if "/" in key}
        on_device = any("memory/device_peak_gib" in other for other in self._lines.values())
        memory = [
            value
            for at, other in self._lines.items()
            if at <= step
            for key, value in other.items()
            if key == ("memory/device_peak_gib" if on_device else "memory/host_gib")
        ]
        return {**line, TIME: self.totals(step)[1], **({MEMORY: max(memory)} if memory else {})}

    def totals(self, step: int) -> tuple[int, float]:
        """Tokens and seconds of the steps up to one: a logged step stands for those since the one before."""
        tokens, seconds, before = 0, 0.0, 0
        for at in sorted(self._lines):
            line = self._lines[at]
            if at <= step and "train/tokens" in line:
                steps = min(at - before, self._every)  # the last step is logged whatever the interval
                tokens += line["train/tokens"] * steps
                seconds += line.get("train/step_s", 0.0) * steps
                before = at
        return tokens, round(seconds, 3)


def failure_reason(error: BaseException) -> str:
    """Why a training failed, in one line."""
    if isinstance(error, RaylmError):
        return str(error)
    failures = getattr(error, "worker_failures", None)
    first = next(iter(failures.values())) if failures else error
    cause = getattr(first, "cause", None) or first
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[-1] if lines else ''}".rstrip(": ")
