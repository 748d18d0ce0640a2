"""Schedulers remember a former session, and population based training copies through the sweep's own files."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from raylm.config.sweep import SchedulerSection
from raylm.tuning.journal import Report, SweepState, Trial
from raylm.tuning.plans import Extent, progress

schedulers = pytest.importorskip("raylm.tuning.schedulers")
STOP, CONTINUE = "STOP", "CONTINUE"


def made(name: str, state: SweepState, *, again: tuple[int, ...] = (), max_steps: int = 9, **settings: Any) -> Any:
    return schedulers.make_scheduler(
        SchedulerSection(name=name, **settings),
        mode="min",
        extent=Extent(max_steps, 1, 5.0),
        state=state,
        again=again,
        seed=5,
        report=lambda *_: None,
        exchange=lambda *_: True,
    )


def past(*values: tuple[str, list[float]]) -> SweepState:
    """Trials with reports at steps 1, 2, …"""
    trials = {}
    for number, (state, losses) in enumerate(values):
        reports = [Report(step, value, 0, 0.0, {}, {}, 5.0) for step, value in enumerate(losses, start=1)]
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


def tell(scheduler: Any, number: int, losses: list[float], *, first: int = 1, step_tokens: float = 5.0) -> list[str]:
    """What it says to the reports of steps `first` and on."""
    controller = SimpleNamespace(get_live_trials=list, search_alg=None)
    trial = FakeTrial(number)
    scheduler.on_trial_add(controller, trial)
    return [
        scheduler.on_trial_result(controller, trial, reported(step, value, step_tokens))
        for step, value in enumerate(losses, start=first)
    ]


def reported(step: int, value: float, step_tokens: float = 5.0) -> dict[str, float]:
    return {"step": step, "progress": progress(step, step_tokens, 5.0), "value": value}


def test_asha_judges_by_the_rungs_of_all_sessions() -> None:
    """T01: the scheduler's state is that of one sweep."""
    former = past(("finished", [0.1] * 9), ("stopped", [0.5]), ("finished", [0.2] * 9), ("failed", [0.0]))
    assert tell(made("asha", SweepState(), reduction_factor=3), 4, [0.4]) == [CONTINUE]
    assert tell(made("asha", former, reduction_factor=3), 4, [0.4]) == [STOP]
    assert tell(made("asha", former, reduction_factor=3), 4, [0.05]) == [CONTINUE]


def test_trials_are_in_the_same_brackets_in_every_session() -> None:
    """T01: also those that come after a resume, whatever was drawn besides."""
    options: dict[str, Any] = {"reduction_factor": 2, "brackets": 3}
    whole = made("asha", SweepState(), **options)
    for number in range(6):
        tell(whole, number, [0.1])
    former = past(*[("finished", [0.1])] * 3, ("unfinished", [0.1]))
    resumed = made("asha", former, again=(3,), **options)
    np.random.seed(1)
    for number in (3, 4, 5):
        tell(resumed, number, [0.1])
    first, second = (
        {str(trial)[-1]: scheduler._brackets.index(bracket) for trial, bracket in scheduler._trial_info.items()}
        for scheduler in (whole, resumed)
    )
    assert first == second
    assert len(set(first.values())) > 1


def test_an_unfinished_trial_is_not_judged_again_for_what_it_reported_before() -> None:
    former = past(("finished", [0.1] * 9), ("unfinished", [0.15, 0.15]), ("finished", [0.2] * 9))
    scheduler = made("asha", former, again=(1,), reduction_factor=3)
    assert tell(scheduler, 1, [0.14], first=3) == [STOP]  # third of three at the rung of step 3
    assert tell(made("asha", former, again=(1,), reduction_factor=3), 1, [0.09], first=3) == [CONTINUE]


@pytest.mark.parametrize("name", ["asha", "median_stop"])
def test_what_failed_trials_reported_counts_in_the_next_session_too(name: str) -> None:
    """As it does within one: they came as far as that."""
    settings = {"median_stop": {"min_trials": 2}, "asha": {"reduction_factor": 3}}[name]
    live = made(name, SweepState(), **settings)
    for number in (0, 1):
        assert tell(live, number, [0.1]) == [CONTINUE]
    assert tell(live, 2, [0.5]) == [STOP]
    former = past(("failed", [0.1]), ("failed", [0.1]))
    assert tell(made(name, former, **settings), 2, [0.5]) == [STOP]


def test_a_failed_trial_that_is_tried_again_is_not_compared_with_itself() -> None:
    former = past(("finished", [0.3] * 9), ("failed", [0.1, 0.1]))
    assert tell(made("asha", former, again=(1,), reduction_factor=2), 1, [0.2], first=3) == [CONTINUE]
    scheduler = made("median_stop", former, again=(1,), min_trials=2)
    assert tell(scheduler, 1, [0.9], first=3) == [CONTINUE]  # one other is too few


def test_the_last_report_of_a_stopped_trial_counts_once_in_its_mean() -> None:
    scheduler = made("median_stop", SweepState(), min_trials=1)
    controller, trial = SimpleNamespace(get_live_trials=list, search_alg=None), FakeTrial(0)
    scheduler.on_trial_add(controller, trial)
    for step, value in ((1, 0.1), (2, 0.7)):
        scheduler.on_trial_result(controller, trial, reported(step, value))
    scheduler.on_trial_complete(controller, trial, reported(2, 0.7))
    assert tell(scheduler, 1, [0.45], first=2) == [STOP]  # the mean is 0.4, and 0.5 if it counted twice


@pytest.mark.parametrize("again", [(), (3,)])
def test_a_median_of_trials_that_were_not_there_yet_changes_no_former_answer(again: tuple[int, ...]) -> None:
    """T01: the worst trial reported before the others each time, so nobody stopped it."""
    former = past(*[("finished", [0.1] * 3)] * 3, ("failed" if again else "finished", [0.9] * 3))
    scheduler = made("median_stop", former, again=again, min_trials=3)
    if again:
        assert tell(scheduler, 3, [0.9], first=4) == [CONTINUE]  # no other came as far
    assert tell(scheduler, 4, [0.9], first=1) == [STOP]
    assert tell(scheduler, 5, [0.05], first=1) == [CONTINUE]


def test_rungs_reach_to_the_end_of_the_longest_trial() -> None:
    short, long = (made("asha", SweepState(), max_steps=steps, reduction_factor=3, grace_steps=3) for steps in (3, 27))
    assert [[rung for rung, _ in one._brackets[0]._rungs] for one in (short, long)] == [[3], [27, 9, 3]]
    assert made("hyperband", SweepState(), max_steps=27)._max_t_attr == 27


def test_steps_of_different_size_are_compared_after_as_many_tokens() -> None:
    """A batch twice as large has come to the rung of step 4 with its second step, and to no rung with its first."""
    former = past(("finished", [0.9, 0.9, 0.9, 0.1]))
    scheduler = made("asha", former, reduction_factor=2, grace_steps=4)
    assert tell(scheduler, 1, [0.5, 0.5], step_tokens=10.0) == [CONTINUE, STOP]
    assert tell(scheduler, 2, [0.5, 0.5]) == [CONTINUE, CONTINUE]


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
    assert scheduler.on_trial_result(controller, trial, reported(5, 0.5)) == CONTINUE


def test_every_scheduler_can_be_made() -> None:
    for name in ("none", "asha", "median_stop", "hyperband", "pbt"):
        assert made(name, SweepState()) is not None


def test_a_population_notes_a_report_before_it_copies() -> None:
    """What a copy changes is not what the report was trained with."""
    done: list[Any] = []
    scheduler = schedulers.Population(
        lambda number, result: done.append(("report", number, result["step"])),
        lambda number, source, step: bool(done.append(("copy", number, source, step))),
        time_attr="progress",
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
            scheduler.on_trial_result(controller, trial, reported(step, value))
    assert done == [*(("report", number, step) for step in (2, 4) for number in (0, 1)), ("copy", 1, 0, 4)]
