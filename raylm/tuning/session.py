"""A sweep while its driver runs: numbers trials, writes the journal, answers Ray Tune (tune_run.py)."""

import logging
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raylm.config import TrainConfig
from raylm.errors import RaylmError, RunDirError
from raylm.training.checkpoint import checkpoint_name
from raylm.training.run_dir import RunDir
from raylm.training.stopping import DESCRIPTIONS, STOP_FILE, Stop
from raylm.tuning.candidates import Candidates
from raylm.tuning.journal import Journal, SweepState
from raylm.tuning.pins import drop_checkpoints, link_checkpoint, newest_pin, pin_path, settle_best
from raylm.tuning.plans import TrialPlan, failure_file, settle_copies, staged_copy, take_copy, write_plan
from raylm.tuning.room import Room
from raylm.tuning.search import Search, generator
from raylm.tuning.space import Settings, described, perturbed
from raylm.tuning.trackers import Trackers

logger = logging.getLogger(__name__)

MOST_FAILURES = 8
"""Trials that may fail one after another without a report, where time or tokens are to end the sweep: they use neither
up."""


class Session:
    """What one driver does for a sweep."""

    def __init__(
        self, candidates: Candidates, search: Search, journal: Journal, room: Room, *, retry_failed: bool
    ) -> None:
        """retry_failed: trials that failed before go on from their newest checkpoint."""
        self._candidates, self._search, self._journal, self._room = candidates, search, journal, room
        self.config, self.sweep_dir = candidates.config, candidates.sweep_dir
        self._waiting = [
            trial.number
            for trial in sorted(self.state.trials.values(), key=lambda trial: trial.number)
            if not trial.has_ended or (retry_failed and trial.state == "failed")
        ]
        self._former_seconds, self._started = self.state.seconds, time.monotonic()
        self._trackers = Trackers()
        self._noted: set[int] = set()
        self._failures = 0
        self.interrupted = False
        self.ended_here = 0
        """Trials that have ended in this session."""
        settle_copies(self.sweep_dir, {trial.number: len(trial.copied_from) for trial in self.state.trials.values()})
        journal.write("session", retry_failed=retry_failed, folder=self.state.folder or os.getcwd())

    def __reduce__(self) -> Any:
        """Ray Tune pickles its scheduler and what may stop it, and with them this; nothing is restored from that."""
        return str, ("a session",)

    @property
    def state(self) -> SweepState:
        """All trials so far."""
        return self._journal.state

    @property
    def problem(self) -> RunDirError | None:
        """Why the journal could not be written, if so."""
        return self._journal.problem

    @property
    def seconds(self) -> float:
        """Wall time of all sessions."""
        return self._former_seconds + time.monotonic() - self._started

    @property
    def seconds_here(self) -> float:
        """Wall time of this session."""
        return time.monotonic() - self._started

    def trial_dir(self, number: int) -> Path:
        """The run directory of a trial."""
        return self._candidates.trial_dir(number)

    @property
    def going_on(self) -> frozenset[int]:
        """Former trials that are still to go on."""
        return frozenset(self._waiting)

    @property
    def num_trials(self) -> int | None:
        """Trials there will be; None where time or tokens decide."""
        limits = [limit for limit in (self.config.budget.trials, self._search.size) if limit is not None]
        return min(limits, default=None)

    def is_over(self) -> bool:
        """Whether time or tokens are used up, or somebody asked for an end."""
        budget = self.config.budget
        out_of_time = budget.time_s is not None and self.seconds >= budget.time_s
        return self.interrupted or out_of_time or (budget.tokens is not None and self.state.tokens >= budget.tokens)

    def has_more(self) -> bool:
        """Whether a trial may be started."""
        left = self.num_trials is None or len(self.state.trials) < self.num_trials
        return not self.is_over() and (bool(self._waiting) or left)

    @property
    def _gave_up(self) -> bool:
        return self.num_trials is None and self._failures >= MOST_FAILURES

    def next_trial(self) -> int | None:
        """The number of the trial to start next, whose plan is written; None when there is no more."""
        while not self.is_over() and not self._gave_up:
            if self._waiting:
                number = self._waiting.pop(0)
                settings = self.state.trials[number].settings
            else:
                number = len(self.state.trials)
                if self.num_trials is not None and number >= self.num_trials:
                    return None
                suggested = self._search.suggest(number, self.state)
                if suggested is None:
                    return None
                settings = suggested
                self._journal.write("trial", number=number, settings=settings)
            try:
                config = self._checked(number, settings)
            except RaylmError as error:
                self.ended(number, "failed", str(error))
                continue
            self._plan(number, config)
            self._journal.write("start", number=number, num_steps=self.state.trials[number].num_steps)
            logger.info("trial %d starts: %s", number, described(settings))
            return number
        return None

    def _checked(self, number: int, settings: Settings) -> TrainConfig:
        """The configuration of a trial. Raises RaylmError for settings that cannot be."""
        from raylm.training.before_start import with_absolute_paths

        config = with_absolute_paths(self._candidates.build(number, settings))
        self._candidates.check_whole(config, settings)
        return config

    def _plan(self, number: int, config: TrainConfig) -> None:
        self._settle(number)
        self._trackers.start(number, config)
        write_plan(
            self.sweep_dir,
            TrialPlan(
                number,
                config.model_dump(mode="json"),
                self._candidates.metric(config),
                self.config.mode,
                self._candidates.report_interval(config),
                self._room.resources(config),
                tuple(objective.metric for objective in self.config.search.objectives),
                self.state.trials[number].step,
            ),
        )

    def note(self, number: int, flat: Mapping[str, Any]) -> None:
        """A trial has reported, and its scheduler is about to act on it. flat: the result as Ray Tune flattens it for
        schedulers; `reported` is called with the result itself afterwards."""
        prefix = "figures/"
        figures = {key.removeprefix(prefix): value for key, value in flat.items() if key.startswith(prefix)}
        self.reported(number, {**flat, "figures": figures})
        self._noted.add(number)

    def reported(self, number: int, result: Mapping[str, Any]) -> None:
        """A trial has reported."""
        if number in self._noted:
            self._noted.discard(number)
        elif result.get("is_new"):
            self._failures = 0
            names = ("step", "value", "tokens", "seconds", "figures", "num_steps", "step_tokens")
            self._journal.write("report", number=number, **{name: result[name] for name in names})
            self._settle(number)

    def _settle(self, number: int) -> None:
        best = self.state.trials[number].best(self.config.mode)
        if best is not None:
            settle_best(self._candidates.trial_dir(number), best.step, best.value)

    def ended(self, number: int, state: str, reason: str = "") -> None:
        """A trial has ended; frees what it need not keep on the disk."""
        if state == "finished":
            state, reason = self._early_end(number)
        self.ended_here += 1
        self._failures += state == "failed" and not self.state.trials[number].reports
        if self.num_trials is None and self._failures == MOST_FAILURES:
            logger.warning("%d trials in a row failed: no more are started. The last reason: %s", MOST_FAILURES, reason)
        self._trackers.end(number, failed=state == "failed")
        self._journal.write("end", number=number, state=state, **({"reason": reason} if reason else {}))
        trial_dir = self._candidates.trial_dir(number)
        if state == "stopped" and trial_dir.is_dir():
            (trial_dir / STOP_FILE).touch()
        last = self.state.trials[number].last
        shown = f", {last.value:.4g} at step {last.step}" if last else ""
        logger.info("trial %d %s%s%s", number, state, shown, f": {reason}" if reason else "")

    def _early_end(self, number: int) -> tuple[str, str]:
        """State and reason of a trial whose training has ended by itself, perhaps before its last step."""
        trial, file = self.state.trials[number], RunDir(self._candidates.trial_dir(number)).stopped
        reason = file.read_text() if file.is_file() and trial.last and trial.last.step != trial.num_steps else ""
        failure = self._trackers.failure(number)
        if failure and reason == DESCRIPTIONS[Stop.REQUESTED]:
            return "failed", failure
        return "finished", reason

    def close(self) -> None:
        """No trial runs any more: those that did not end are unfinished. Frees the disk, lets trackers have what they
        lack, and notes what they do not take."""
        self.state.seconds = self.seconds
        for trial in self.state.trials.values():
            trial.state = "unfinished" if trial.state == "running" else trial.state
        self.free_disk()
        for number, sinks in self._trackers.close().items():
            self._journal.write("lacking", number=number, sinks=sinks)

    def failed(self, number: int, otherwise: str) -> None:
        """A trial has ended with an error. otherwise: the reason when its process left none."""
        path = failure_file(self.sweep_dir, number)
        self.ended(number, "failed", path.read_text() if path.is_file() else otherwise)

    def free_disk(self) -> None:
        """Deletes checkpoints that `keep` does not ask for. Those of trials that may go on stay."""
        best = self.state.best(self.config.mode)
        for trial in self.state.trials.values():
            if trial.state not in ("finished", "stopped"):
                continue
            is_best = best is not None and best[0].number == trial.number
            drop_checkpoints(self._candidates.trial_dir(trial.number), but_best=self.config.keep == "all" or is_best)

    def exchange(self, number: int, source: int, step: int) -> bool:
        """Lets a trial go on from another's checkpoint, with settings near the other's; False where the other has none,
        or the settings cannot be, and the trial goes on as it is."""
        donor = self.state.trials[source]
        found = pin_path(self._candidates.trial_dir(source), step)
        checkpoint = found if found.is_dir() else newest_pin(self._candidates.trial_dir(source))
        if checkpoint is None:
            return False
        section, trial = self.config.scheduler, self.state.trials[number]
        settings = perturbed(
            self.config.space,
            self._candidates.base_settings,
            donor.settings,
            generator(self.config.seed, number, f"copy {len(trial.copied_from)}"),
            factors=section.factors,
            resample_probability=section.resample_probability,
        )
        try:
            config = self._checked(number, settings)
        except RaylmError as error:
            logger.warning("trial %d goes on as it is: %s", number, error)
            return False
        step = int(checkpoint.name.removeprefix("step-"))
        staged = staged_copy(self.sweep_dir, number, len(trial.copied_from) + 1)
        shutil.rmtree(staged, ignore_errors=True)
        link_checkpoint(checkpoint, staged / checkpoint_name(step))
        self._journal.write("copy", number=number, source=source, step=step, settings=settings)
        take_copy(self.sweep_dir, number, staged)
        logger.info("trial %d goes on from step %d of trial %d: %s", number, step, source, described(settings))
        self._plan(number, config)
        return True
