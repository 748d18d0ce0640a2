"""The tree-structured Parzen estimator, by Optuna.

For each suggestion an Optuna study is made from what the journal says, with a sampler seeded by the sweep's seed and
the trial's number: the suggestion is a function of these, so nothing of Optuna's is saved or restored. Trials that go
on count as bad ones (constant liar), so that trials at the same time do not try the same; of those that a scheduler
stopped it counts how far they came and their losses on the way; failed ones do not count.

Source: Bergstra and others, NeurIPS 2011; for several objectives Ozaki and others, GECCO 2020.
"""

import json
import zlib
from collections.abc import Sequence
from typing import Any

from raylm.config.space import DimensionSection
from raylm.tuning.candidates import TIME, Candidates
from raylm.tuning.journal import SweepState, Trial
from raylm.tuning.space import Settings, active, fixed_grids, on_steps, ordered


class OptunaSearch:
    """TPE over one metric or several."""

    def __init__(self, candidates: Candidates) -> None:
        config = candidates.config
        self._space, self._base, self._seed = config.space, candidates.base_settings, config.seed
        self._startup = config.search.startup_trials
        self._objectives = [(None, config.mode), *((one.metric, one.mode) for one in config.search.objectives)]
        self._grids = fixed_grids(self._space, self._base)

    @property
    def size(self) -> int | None:
        """See Search."""
        return None

    def suggest(self, number: int, state: SweepState) -> Settings | None:
        """See Search."""
        study = self._study(number, state)
        trial = study.ask()
        given = self._grids[number % len(self._grids)]
        settings: Settings = {}
        for key in ordered(self._space):
            if key in given:
                settings[key] = given[key]
            elif (dimension := active(self._space[key], settings, self._base)) is not None:
                settings[key] = _suggested(trial, _name(key, dimension), dimension)
        return settings

    def _study(self, number: int, state: SweepState) -> Any:
        import warnings

        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(
                n_startup_trials=self._startup,
                multivariate=True,
                group=True,
                constant_liar=True,
                seed=zlib.crc32(f"{self._seed}:{number}".encode()),
            )
        directions: Any = ["minimize" if mode == "min" else "maximize" for _, mode in self._objectives]
        study: Any = optuna.create_study(sampler=sampler, directions=directions)
        for trial in state.trials.values():
            if trial.number < number and (frozen := self._frozen(trial)) is not None:
                study.add_trial(frozen)
        return study

    def _frozen(self, trial: Trial) -> Any:
        """A trial as Optuna has it; None for one that says nothing."""
        from optuna.trial import TrialState, create_trial

        params, distributions = {}, {}
        settings: Settings = {}
        given = self._grids[trial.number % len(self._grids)]
        for key in ordered(self._space):
            if key not in trial.settings:
                continue
            settings[key] = trial.settings[key]
            dimension = active(self._space[key], settings, self._base)
            if key not in given and dimension is not None:
                name = _name(key, dimension)
                distributions[name] = distribution(dimension)
                params[name] = _encoded(dimension, trial.settings[key])
        if not trial.has_ended:
            return create_trial(state=TrialState.RUNNING, params=params, distributions=distributions)
        values = self._values(trial)
        if values is None:
            return None
        steps = {report.step: report.value for report in trial.reports} if len(values) == 1 else {}
        state = TrialState.PRUNED if trial.state == "stopped" and steps else TrialState.COMPLETE
        return create_trial(
            state=state, values=values, params=params, distributions=distributions, intermediate_values=steps
        )

    def _values(self, trial: Trial) -> list[float] | None:
        if trial.state == "failed" or (last := trial.last) is None:
            return None
        best = trial.best(self._objectives[0][1])
        if best is None:
            return None
        found = [best.value, *(objective_value(last, metric) for metric, _ in self._objectives[1:])]
        return None if any(value is None for value in found) else [float(value) for value in found if value is not None]


def objective_value(report: Any, metric: str | None) -> float | None:
    """A further figure of a report, None when it has it not."""
    if metric == TIME:
        return float(report.seconds)
    value = report.figures.get(metric)
    return None if value is None else float(value)


def distribution(dimension: DimensionSection) -> Any:
    """A dimension as Optuna has it."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if dimension.values is not None:
        return CategoricalDistribution(tuple(_text(value) for value in dimension.values))
    low, high = dimension.bounds
    if dimension.is_integer:
        return IntDistribution(int(low), int(high), log=dimension.is_logarithmic)
    if dimension.step is not None and not dimension.is_logarithmic:
        low, high = float(on_steps(dimension, low)), float(on_steps(dimension, high))
        return FloatDistribution(low, high, step=dimension.step)
    return FloatDistribution(low, high, log=dimension.is_logarithmic)


def _name(key: str, dimension: DimensionSection) -> str:
    """Ranges that depend on other settings are different parameters: their values do not compare."""
    return f"{key} {_text([dimension.kind, dimension.values or dimension.bounds])}"


def _text(value: Any) -> str:
    return json.dumps(value, default=list)


def _encoded(dimension: DimensionSection, value: Any) -> Any:
    return _text(value) if dimension.values is not None else value


def _suggested(trial: Any, name: str, dimension: DimensionSection) -> Any:
    found = distribution(dimension)
    if dimension.values is not None:
        return _by_text(dimension.values, trial.suggest_categorical(name, found.choices))
    suggest = trial.suggest_int if dimension.is_integer else trial.suggest_float
    options = {} if dimension.is_integer else {"step": found.step}
    return on_steps(dimension, suggest(name, found.low, found.high, log=found.log, **options))


def _by_text(values: Sequence[Any], text: str) -> Any:
    return next(value for value in values if _text(value) == text)
