"""Schedulers remember a former session, and population based training copies through the sweep's own files."""

from types import SimpleNamespace
from typing import Any

import pytest

from raylm.config.sweep import SchedulerSection
from raylm.tuning.journal import Report, SweepState, Trial

schedulers = pytest.importorskip("raylm.tuning.schedulers")
STOP, CONTINUE = "STOP", "CONTINUE"


def made(name: str, state: SweepState, **settings: Any) -> Any:
    return schedulers.make_scheduler(
        SchedulerSection(name=name, **settings),
        mode="min",
        interval=1,
        max_steps=9,
        state=state,
        report=lambda *_: None,
        exchange=lambda *_: True,
    )


def past(*values: tuple[str, list[float]]) -> SweepState:
    """Trials with reports at steps 1, 2, …"""
    trials = {}
    for number, (state, losses) in enumerate(values):
        reports = [Report(step, value, 0, 0.0, {}, {}) for step, value in enumerate(losses, start=1)]
        trials[number] = Trial(number, {}, state, reports=reports)
    return SweepState(trials)


class FakeTrial:
    """Has what schedulers ask of Ray Tune's trials."""

    def __init__(self, number: int) -> None:
        self.trial_id, self.config = f"t{number}", {"number": number}
        self.status, self.experiment_tag = "RUNNING", ""
        saving = SimpleNamespace(num_to_keep=None)
        self.run_metadata = SimpleNamespace(checkpoint_manager=SimpleNamespace(checkpoint_config=saving))

    def is_finished(self) -> bool:
        return False


def tell(scheduler: Any, number: int, losses: list[float], *, first: int = 1) -> list[str]:
    controller = SimpleNamespace(get_live_trials=list, search_alg=None)
    trial = FakeTrial(number)
    scheduler.on_trial_add(controller, trial)
    return [
        scheduler.on_trial_result(controller, trial, {"step": step, "value": value})
        for step, value in enumerate(losses, start=first)
    ]


def test_asha_judges_by_the_rungs_of_all_sessions() -> None:
    """T01: the scheduler's state is that of one sweep."""
    former = past(("finished", [0.1] * 9), ("stopped", [0.5]), ("finished", [0.2] * 9), ("failed", [0.0]))
    assert tell(made("asha", SweepState(), reduction_factor=3), 4, [0.4]) == [CONTINUE]
    assert tell(made("asha", former, reduction_factor=3), 4, [0.4]) == [STOP]
    assert tell(made("asha", former, reduction_factor=3), 4, [0.05]) == [CONTINUE]


def test_an_unfinished_trial_is_not_judged_again_for_what_it_reported_before() -> None:
    former = past(("finished", [0.1] * 9), ("unfinished", [0.15, 0.15]), ("finished", [0.2] * 9))
    scheduler = made("asha", former, reduction_factor=3)
    assert tell(scheduler, 1, [0.14], first=3) == [STOP]  # third of three at the rung of step 3
    assert tell(made("asha", former, reduction_factor=3), 1, [0.09], first=3) == [CONTINUE]


def test_the_median_is_that_of_all_sessions() -> None:
    former = past(*[("finished", [0.1, 0.1, 0.1])] * 3)
    assert tell(made("median_stop", former, min_trials=3), 3, [0.5]) == [STOP]
    assert tell(made("median_stop", SweepState(), min_trials=3), 3, [0.5]) == [CONTINUE]


def test_too_few_to_compare_with_pause_nobody() -> None:
    """Though others wait for a place."""
    waiting = SimpleNamespace(status="PENDING")
    controller = SimpleNamespace(get_live_trials=lambda: [waiting], search_alg=None)
    scheduler, trial = made("median_stop", SweepState(), min_trials=3), FakeTrial(0)
    scheduler.on_trial_add(controller, trial)
    assert scheduler.on_trial_result(controller, trial, {"step": 5, "value": 0.5}) == CONTINUE


def test_every_scheduler_can_be_made() -> None:
    for name in ("none", "asha", "median_stop", "hyperband", "pbt"):
        assert made(name, SweepState()) is not None


def test_a_population_notes_a_report_before_it_copies() -> None:
    """What a copy changes is not what the report was trained with."""
    done: list[Any] = []
    scheduler = schedulers.Population(
        lambda number, result: done.append(("report", number, result["step"])),
        lambda number, source, step: bool(done.append(("copy", number, source, step))),
        time_attr="step",
        metric="value",
        mode="min",
        perturbation_interval=1,
        quantile_fraction=0.5,
    )
    trials = [FakeTrial(0), FakeTrial(1)]
    controller = SimpleNamespace(get_trials=lambda: trials, _schedule_trial_save=lambda *_, **__: object())
    for trial in trials:
        scheduler.on_trial_add(controller, trial)
    for step in (2, 4):  # the first to report is known to be good, and saved, when both have reported
        for trial, value in zip(trials, (0.1, 0.9), strict=True):
            scheduler.on_trial_result(controller, trial, {"step": step, "value": value})
    assert done == [*(("report", number, step) for step in (2, 4) for number in (0, 1)), ("copy", 1, 0, 4)]
