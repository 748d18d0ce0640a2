"""Importances against data made to have them, and the report of a sweep that was never run."""

import csv
import random
from pathlib import Path
from typing import Any

import pytest

from raylm.config import SweepConfig, load_config
from raylm.tuning.candidates import Candidates
from raylm.tuning.importance import importances
from raylm.tuning.journal import Report, SweepState, Trial
from raylm.tuning.report import write_sweep_report
from raylm.tuning.results import ranked, write_results


def test_what_decides_is_important_and_what_does_not_is_not() -> None:
    rng = random.Random(0)
    settings = [{"rate": rng.random(), "name": rng.choice("ab"), "noise": rng.random()} for _ in range(200)]
    values = [(one["rate"] - 0.5) + (0.2 if one["name"] == "a" else 0.0) for one in settings]
    found = importances(settings, values, mode="max")
    assert list(found)[:2] == ["rate", "name"]
    assert found["rate"] > 0.6
    assert 0.02 < found["name"] < 0.3
    assert found["noise"] < 0.05


def test_importance_against_omega_squared_by_hand() -> None:
    """Two groups (1, 2, 3) and (3, 4, 5): between 6, within 4 on 4 degrees, total 10: (6 - 1) / (10 + 1)."""
    settings = [{"a": name} for name in "xxxyyy"]
    assert importances(settings, [1.0, 2, 3, 3, 4, 5], mode="max")["a"] == pytest.approx(5 / 11)


def test_one_trial_that_diverged_is_not_all_of_the_variance() -> None:
    settings = [{"a": n % 2, "b": n == 7} for n in range(8)]
    values = [1.0 + 0.1 * (n % 2) for n in range(7)] + [1e9]
    assert importances(settings, values, mode="min")["a"] > 0.7


def test_few_trials_and_single_values_say_nothing() -> None:
    assert importances([{"a": 1}, {"a": 2}, {"a": 3}], [1.0, 2.0, 3.0], mode="min") == {}
    assert importances([{"a": 1}] * 6, [1.0, 2, 3, 4, 5, 6], mode="min") == {}


@pytest.fixture
def sweep(tmp_path: Path) -> tuple[Candidates, SweepState]:
    config = load_config(
        SweepConfig,
        {
            "base": {"model": {"path": "m"}, "data": {"train": "d"}},
            "space": {
                "optimizer.name": {"choice": ["adamw", "sgd"]},
                "optimizer.learning_rate": "suggested",
                "lora": {"choice": [None, {"rank": 4}], "when": {"training.method": "lora"}},
            },
            "budget": {"trials": 9},
        },
    )
    trials = {}
    for number in range(6):
        settings: dict[str, Any] = {
            "optimizer.name": ["adamw", "sgd"][number % 2],
            "optimizer.learning_rate": 10.0 ** -(1 + number),
        }
        reports = [Report(step, 2.0 - number / 10 - step / 100, step * 8, 1.0 * step, {}, settings) for step in (1, 2)]
        trials[number] = Trial(number, settings, "finished", reports=reports)
    trials[5].state, trials[5].reason = "failed", "<b>out</b> of memory"
    trials[6] = Trial(6, {"optimizer.name": "sgd"}, "failed", "the loss is nan")
    return Candidates(config, tmp_path), SweepState(trials, seconds=61.0)


def test_results_have_a_line_for_each_trial_the_best_first(sweep: tuple[Candidates, SweepState]) -> None:
    candidates, state = sweep
    with write_results(candidates, state).open() as file:
        rows = list(csv.DictReader(file))
    assert [row["trial"] for row in rows] == ["5", "4", "3", "2", "1", "0", "6"]
    assert rows[0]["reason"] == "<b>out</b> of memory"
    assert (rows[1]["value"], rows[1]["step"], rows[1]["tokens"]) == ("1.58", "2", "16")
    assert rows[-1]["optimizer.learning_rate"] == ""
    assert [trial.number for trial in ranked(state, "max")][:2] == [0, 1]


def test_the_report_shows_trials_pictures_and_reasons(sweep: tuple[Candidates, SweepState]) -> None:
    candidates, state = sweep
    page = write_sweep_report(candidates, state).read_text()
    assert "&lt;b&gt;out&lt;/b&gt; of memory" in page
    assert page.count("data:image/png") == 4
    for name in ("losses", "parallel", "importance", "learning_rates"):
        assert (candidates.sweep_dir / f"{name}.png").stat().st_size > 5000
    assert "The best is the lowest train/loss that any trial ever reported" in page


def test_a_sweep_without_trials_has_a_report_too(sweep: tuple[Candidates, SweepState]) -> None:
    candidates, _ = sweep
    page = write_sweep_report(candidates, SweepState()).read_text()
    assert "none" in page
    assert "data:image/png" not in page
