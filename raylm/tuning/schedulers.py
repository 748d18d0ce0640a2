"""Ray Tune's schedulers, made for a sweep that may have a past.

A resumed sweep is a new experiment to Ray Tune. `asha` and `median_stop` are told again what trials reported before, so
their rungs and medians are those of one sweep; `hyperband` and `pbt` begin anew with the trials that go on.
"""

import random
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from raylm.config.sweep import SchedulerSection
from raylm.tuning.journal import SweepState, Trial
from raylm.tuning.plans import Extent, progress

STEP, PROGRESS, VALUE = "step", "progress", "value"
_NOBODY = SimpleNamespace(get_live_trials=list, search_alg=None)
"""Stands for Tune's controller while the past is told, when nothing can be paused."""

WAITING = ("hyperband", "pbt")
"""Schedulers that pause trials for others: these are made beforehand, and Tune runs as many as there is room for."""
Report = Callable[[int, Mapping[str, Any]], None]
"""Notes what a trial reports, before anything follows from it: (trial, flat result)."""
Exchange = Callable[[int, int, int], bool]
"""Lets a trial go on from another's checkpoint: (trial, source, step) -> whether there was one."""


def make_scheduler(
    section: SchedulerSection,
    *,
    mode: str,
    extent: Extent,
    state: SweepState,
    again: Collection[int],
    seed: int,
    report: Report,
    exchange: Exchange,
) -> TrialScheduler:
    """The scheduler of a section. extent: how far trials go; again: numbers of former trials that go on;
    seed: of brackets and partners."""
    _seed(seed)
    first = section.grace_steps or extent.interval or 1
    max_steps = section.max_steps or extent.max_steps
    common = {"time_attr": PROGRESS, "metric": VALUE, "mode": mode}
    former = _FormerTrials(state, again, extent.unit, seed)
    makers: Mapping[str, Callable[[], TrialScheduler]] = {
        "none": FIFOScheduler,
        "asha": lambda: _remembering(AsyncHyperBandScheduler)(
            former,
            **common,
            grace_period=min(first, max_steps),
            max_t=max_steps,
            reduction_factor=section.reduction_factor,
            brackets=section.brackets,
            stop_last_trials=False,
        ),
        "median_stop": lambda: _remembering(MedianStop)(
            former, **common, grace_period=first, min_samples_required=section.min_trials
        ),
        "hyperband": lambda: HyperBandScheduler(
            **common,
            max_t=max_steps,
            reduction_factor=section.reduction_factor,
            stop_last_trials=False,
        ),
        "pbt": lambda: Population(
            report,
            exchange,
            **common,
            perturbation_interval=section.interval_steps or extent.interval or 1,
            quantile_fraction=section.quantile,
        ),
    }
    return makers[section.name]()


@dataclass(frozen=True, slots=True)
class _FormerTrials:
    """Trials with reports, when a session begins. again: numbers of those that go on."""

    state: SweepState
    again: Collection[int]
    unit: float
    seed: int

    def reports_of(self, trial: Trial) -> Iterator[dict[str, float]]:
        """As the scheduler had them."""
        for report in list(trial.reports):
            yield {PROGRESS: progress(report.step, report.step_tokens, self.unit), VALUE: report.value}


class _Former:
    """Stands for a trial of a former session; schedulers have trials as keys."""

    def __init__(self, number: int) -> None:
        self.trial_id = f"former-{number}"


def _remembering(kind: type[TrialScheduler]) -> Any:
    """A scheduler that knows what trials reported in former sessions: also those that failed afterwards, as it would
    within one session."""

    class Remembering(kind):
        def __init__(self, former: _FormerTrials, **options: Any) -> None:
            super().__init__(**options)
            self._former = former
            self._trials = {number: trial for number, trial in former.state.trials.items() if trial.reports}
            for number, trial in self._trials.items():
                if number not in former.again:
                    stand_in = _Former(number)
                    self._add(_NOBODY, stand_in, number)
                    self._tell(stand_in, trial)

        def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
            number = trial.config["number"]
            self._add(tune_controller, trial, number)
            if number in self._trials and number in self._former.again:
                self._tell(trial, self._trials[number])

        def _add(self, tune_controller: Any, trial: Any, number: int) -> None:
            _seed(self._former.seed, number)  # a trial is in the same bracket in every session
            super().on_trial_add(tune_controller, trial)

        def _tell(self, stand_in: Any, trial: Trial) -> None:
            for report in self._former.reports_of(trial):
                super().on_trial_result(_NOBODY, stand_in, report)
                # What was answered then stands: a median of more trials than there were by then may say otherwise, and
                # Ray takes a report of a trial that it has stopped for a fault.
                getattr(self, "_stopped_trials", set()).discard(stand_in)

    return Remembering


class MedianStop(MedianStoppingRule):
    """A trial with too few others to compare with goes on: a pause would end its processes for nothing. The last
    report of a trial counts once in its mean."""

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Ray Tune tells the last report again."""
        known = self._results[trial]
        if PROGRESS in result and (not known or known[-1][PROGRESS] != result[PROGRESS]):
            super().on_trial_complete(tune_controller, trial, result)

    def _on_insufficient_samples(self, tune_controller: Any, trial: Any, time: float) -> str:
        return str(TrialScheduler.CONTINUE)


class Population(PopulationBasedTraining):
    """Exchanges checkpoints and settings through the sweep's own files; what the settings become is decided there."""

    def __init__(self, report: Report, exchange: Exchange, **options: Any) -> None:
        super().__init__(**options, custom_explore_fn=lambda config: config, log_config=False)
        self._report, self._exchange = report, exchange

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Ray Tune refuses searchers here; the sweep's only numbers trials."""
        super().on_trial_add(_NOBODY, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Tune asks its scheduler before it tells its callbacks, and an exchange changes the trial's settings."""
        self._report(trial.config["number"], result)
        return str(super().on_trial_result(tune_controller, trial, result))

    def _exploit(self, tune_controller: Any, trial: Any, trial_to_clone: Any) -> None:
        step = self._trial_state[trial_to_clone].last_result[STEP]
        if self._exchange(trial.config["number"], trial_to_clone.config["number"], step):
            super()._exploit(tune_controller, trial, trial_to_clone)

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return dict(trial.config), {}


def _seed(seed: int, number: int = 0) -> None:
    """Ray Tune draws brackets and partners from the global generators."""
    random.seed(f"{seed} {number}")
    np.random.seed([seed, number])
