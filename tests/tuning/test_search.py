"""Suggestions are functions of the seed, the number and the journal."""

from pathlib import Path
from typing import Any

import pytest

from raylm.config import SweepConfig, load_config
from raylm.tuning.candidates import Candidates
from raylm.tuning.journal import Report, SweepState, Trial
from raylm.tuning.results import pareto_front
from raylm.tuning.search import make_search

BASE = {"model": {"path": "m"}, "data": {"train": "d"}}


def candidates(**settings: Any) -> Candidates:
    config = load_config(
        SweepConfig,
        {
            "base": BASE,
            "space": {"optimizer.learning_rate": {"loguniform": [1e-5, 1e-1]}},
            "budget": {"trials": 30},
            **settings,
        },
    )
    return Candidates(config, Path("sweep"))


def report(value: float, step: int = 10, **figures: float) -> Report:
    return Report(step, value, 0, figures.get("time_s", 1.0), figures, {})


def run(found: Candidates, objective: Any, count: int, *, until: int | None = None) -> list[Trial]:
    """`count` trials one after the other; with `until` the search is made anew after so many, as on resuming."""
    search, state = make_search(found), SweepState()
    for number in range(count):
        if number == until:
            search = make_search(found)
        settings = search.suggest(number, state)
        assert settings is not None
        state.trials[number] = Trial(number, settings, "finished", reports=[report(objective(settings))])
    return list(state.trials.values())


def test_random_trials_depend_on_seed_and_number_alone() -> None:
    search = make_search(candidates())
    first = [search.suggest(number, SweepState()) for number in range(5)]
    assert [make_search(candidates()).suggest(number, SweepState()) for number in (4, 0)] == [first[4], first[0]]
    assert make_search(candidates(seed=1)).suggest(0, SweepState()) != first[0]
    assert len({str(settings) for settings in first}) == 5


def test_grids_are_gone_through_whatever_the_search() -> None:
    grids = {"optimizer.name": {"grid": ["adamw", "lion"]}, "optimizer.learning_rate": {"loguniform": [1e-5, 1e-1]}}
    for name in ("random", "optuna"):
        found = run(candidates(space=grids, search=name), lambda settings: settings["optimizer.learning_rate"], 6)
        assert [trial.settings["optimizer.name"] for trial in found] == ["adamw", "lion"] * 3


def test_a_grid_ends() -> None:
    space = {"optimizer.learning_rate": {"loguniform": [1e-4, 1e-2], "points": 3}}
    search = make_search(candidates(space=space, search="grid"))
    assert search.size == 3
    assert search.suggest(2, SweepState()) == {"optimizer.learning_rate": 0.01}
    assert search.suggest(3, SweepState()) is None


@pytest.mark.parametrize("scheduler", ["none", "asha", "hyperband", "median_stop"])
def test_a_grid_is_shuffled_where_trials_are_compared_with_those_before(scheduler: str) -> None:
    rates = [float(number) for number in range(1, 11)]
    space = {"optimizer.learning_rate": {"choice": rates}}

    def order(seed: int) -> list[float]:
        search = make_search(candidates(space=space, search="grid", scheduler=scheduler, seed=seed))
        points = [search.suggest(number, SweepState()) for number in range(10)]
        return [point["optimizer.learning_rate"] for point in points if point]

    assert sorted(order(0)) == rates
    assert (order(0) == rates) == (scheduler == "none")
    assert order(0) == order(0)
    assert (order(0) == order(1)) == (scheduler == "none")


def test_tpe_goes_on_after_a_restart_as_if_there_was_none() -> None:
    """T01: same searcher, same seed, the same ten distinct trials."""
    found = candidates(search={"name": "optuna", "startup_trials": 3})

    def objective(settings: Any) -> float:
        return float(settings["optimizer.learning_rate"])

    whole, resumed = run(found, objective, 10), run(found, objective, 10, until=4)
    assert [trial.settings for trial in whole] == [trial.settings for trial in resumed]
    assert len({str(trial.settings) for trial in whole}) == 10


def test_tpe_learns_where_good_rates_are() -> None:
    import math

    found = candidates(search={"name": "optuna", "startup_trials": 6})

    def objective(settings: Any) -> float:
        return abs(math.log10(settings["optimizer.learning_rate"]) + 2.0)

    trials = run(found, objective, 24)
    late = [objective(trial.settings) for trial in trials[12:]]
    assert sum(late) / len(late) < 0.65  # of draws at random: (3 x 1.5 + 1 x 0.5) / 4 = 1.25


def test_tpe_takes_conditions_choices_and_running_trials() -> None:
    space = {
        "optimizer.name": {"choice": ["adamw", "sgd"]},
        "optimizer.learning_rate": "suggested",
        "optimizer.weight_decay": {"choice": [0.0, 0.1], "when": {"optimizer.name": "adamw"}},
        "schedule.warmup_steps": {"integers": [0, 4]},
        "schedule.min_ratio": {"quniform": [0.0, 0.5, 0.1]},
    }
    found = candidates(space=space, search={"name": "optuna", "startup_trials": 2})
    search, state = make_search(found), SweepState()
    for number in range(12):
        settings = search.suggest(number, state)
        assert settings is not None
        assert ("optimizer.weight_decay" in settings) == (settings["optimizer.name"] == "adamw")
        low, high = {"adamw": (1e-6, 1e-4), "sgd": (1e-4, 1e-1)}[settings["optimizer.name"]]
        assert low <= settings["optimizer.learning_rate"] <= high
        ended = ["finished", "failed", "stopped", "running"][number % 4]
        reports = [] if ended == "failed" else [report(1.0 / (1 + number), step) for step in (5, 10)]
        state.trials[number] = Trial(number, settings, ended, reports=reports)


def test_several_objectives_have_a_front() -> None:
    found = candidates(search={"name": "optuna", "startup_trials": 2, "objectives": [{"metric": "time_s"}]})
    points = [(1.0, 5.0), (2.0, 1.0), (2.0, 6.0), (0.5, 9.0), (3.0, 1.0)]
    search, state = make_search(found), SweepState()
    for number, (loss, seconds) in enumerate(points):
        settings = search.suggest(number, state)
        assert settings is not None
        state.trials[number] = Trial(number, settings, "finished", reports=[report(loss, time_s=seconds)])
    assert [trial.number for trial in pareto_front(found, state)] == [0, 1, 3]
