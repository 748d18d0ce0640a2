"""What a driver does between Ray Tune's questions: numbers, plans, budgets, exchanges, the table. No Ray here."""

import io
import json
import math
import pickle
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

import raylm
from raylm.cli import main
from raylm.config import SweepConfig, load_config
from raylm.errors import ConfigError, RunDirError
from raylm.training.before_start import with_absolute_paths
from raylm.training.checkpoint import CheckpointMeta, checkpoint_name
from raylm.training.checkpoint_writer import CheckpointWriter
from raylm.training.metrics import EventsWriter
from raylm.training.run_dir import open_run_dir
from raylm.training.sinks import follow
from raylm.tuning.candidates import Candidates
from raylm.tuning.journal import Journal, Report, SweepState, read_journal
from raylm.tuning.pins import link_checkpoint, pin
from raylm.tuning.plans import Extent, copy_folder, data_key, failure_file, progress, read_plan, staged_copy
from raylm.tuning.progress import SweepView, _Lines, watch_sweep
from raylm.tuning.results import finish_sweep, retrain_config
from raylm.tuning.room import Room
from raylm.tuning.run import extent_of, outline_sweep, resume_sweep, run_sweep
from raylm.tuning.running import _Figures
from raylm.tuning.search import RandomSearch, make_search
from raylm.tuning.session import Session
from raylm.tuning.space import described
from tests.conftest import PAIRS
from tests.terminal import Terminal, check_log_stands_above


@pytest.fixture
def settings(tiny_model_dir: Path, write_dataset: Any, tmp_path: Path) -> dict[str, Any]:
    return {
        "base": {
            "model": {"path": str(tiny_model_dir)},
            "data": {"train": str(write_dataset(PAIRS)), "max_seq_len": 64},
            "training": {"global_batch_size": 4, "max_steps": 4},
            "checkpoint": {"interval_steps": 2},
            "metrics": {"sinks": []},
        },
        "dir": str(tmp_path / "sweep"),
        "space": {"optimizer.learning_rate": {"loguniform": [1e-5, 1e-3]}},
        "budget": {"trials": 3},
    }


def candidates_of(settings: dict[str, Any], **overrides: Any) -> Candidates:
    config = load_config(SweepConfig, {**settings, **overrides})
    return Candidates(config, Path(config.dir))


def session(settings: dict[str, Any], *, retry_failed: bool = False, **overrides: Any) -> Session:
    candidates = candidates_of(settings, **overrides)
    folder = candidates.sweep_dir
    folder.mkdir(exist_ok=True)
    return Session(candidates, make_search(candidates), Journal(folder), Room(1, 1, 0.0, 2), retry_failed=retry_failed)


def report(step: int, value: float, tokens: int = 10) -> dict[str, Any]:
    figures = {"train/loss": value}
    return {
        "step": step,
        "value": value,
        "tokens": tokens,
        "seconds": 1.0,
        "figures": figures,
        "num_steps": 4,
        "step_tokens": 5.0,
        "is_new": True,
    }


def with_sinks(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **metrics: Any) -> Session:
    """A first trial that trains, whose figures a server is to get that nobody hears."""
    monkeypatch.setattr(follow, "POLL_S", 0.02)
    monkeypatch.setattr(follow, "CLOSING_S", 2.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    settings["base"]["metrics"] = {"sinks": ["mlflow"], "mlflow": {"tracking_uri": "http://127.0.0.1:9"}, **metrics}
    found = session(settings)
    assert found.next_trial() == 0
    found.trial_dir(0).mkdir(parents=True)
    (found.trial_dir(0) / "metrics.jsonl").write_text(json.dumps({"step": 1, "train/loss": 2.0}) + "\n")
    found.reported(0, report(2, 1.0))
    return found


def test_a_sink_that_fails_costs_no_trial_and_is_told(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it costs `raylm train` no run."""
    found = with_sinks(settings, monkeypatch)
    found.reported(0, report(4, 0.5))
    found.ended(0, "finished")
    found.close()
    (trial,) = read_journal(found.sweep_dir).trials.values()
    assert trial.state == "finished"
    assert list(trial.lacking) == ["mlflow"]
    result = finish_sweep(candidates_of(settings), found.state, interrupted=False, started=0.0)
    assert (result.best, result.value, result.lacking) == (0, 0.5, {"mlflow": [0]})
    for file in (result.results, result.report):
        assert "mlflow lacks figures (" in Path(file).read_text()


def test_a_trial_that_a_failing_sink_stops_has_not_finished(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With metrics.on_sink_failure=stop: what it reported counts, and asked to it goes on."""
    found = with_sinks(settings, monkeypatch, on_sink_failure="stop")
    deadline = time.monotonic() + 60
    while not (found.trial_dir(0) / "stop").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (found.trial_dir(0) / "stopped.txt").write_text("it was asked to stop")
    found.ended(0, "finished")
    found.close()
    (trial,) = read_journal(found.sweep_dir).trials.values()
    assert (trial.state, trial.reason) == ("failed", "mlflow takes no figures (metrics.on_sink_failure=stop)")
    assert found.state.best("min") is not None
    assert session(settings, retry_failed=True).next_trial() == 0


@pytest.mark.parametrize(("last", "reason"), [(2, "the evaluation no longer improves"), (4, "")])
def test_a_trial_that_ended_early_says_why(settings: dict[str, Any], last: int, reason: str) -> None:
    found = session(settings)
    found.next_trial()
    found.trial_dir(0).mkdir(parents=True)
    (found.trial_dir(0) / "stopped.txt").write_text("the evaluation no longer improves")
    found.reported(0, report(last, 1.0))
    found.ended(0, "finished")
    assert (found.state.trials[0].state, found.state.trials[0].reason) == ("finished", reason)


def extent(settings: dict[str, Any], space: dict[str, Any], **base: Any) -> Extent:
    """Of a sweep over 40 sequences of ten tokens, four of them a step."""
    training = {"training.max_steps": None, "data.packing": False, **base}
    found = candidates_of(settings, set=training, space=space)
    built = [found.build(number, point) for number, point in enumerate(found.corners())]
    store = SimpleNamespace(lengths=np.full(40, 10), weights=None)
    data = {data_key(with_absolute_paths(config)): SimpleNamespace(store=store) for config in built}
    return extent_of(found, built, data)


def test_the_longest_trial_says_how_far_rungs_go(settings: dict[str, Any]) -> None:
    """Though the first one is shorter."""
    assert extent(settings, {"training.num_epochs": {"choice": [1, 9]}}) == Extent(90, 2, 40.0)


def test_steps_of_larger_batches_are_longer(settings: dict[str, Any]) -> None:
    space = {"training.global_batch_size": {"choice": [8, 4]}}
    assert extent(settings, space, **{"training.num_epochs": 2}) == Extent(20, 2, 40.0)
    assert (progress(5, 80.0, 40.0), progress(5, 40.0, 40.0)) == (10, 5)


def test_ray_tune_may_pickle_what_hangs_on_a_session(settings: dict[str, Any]) -> None:
    """Its scheduler and its stopper; trackers that are open have threads."""
    settings["base"]["metrics"] = {"sinks": ["tensorboard"]}
    running = session(settings)
    assert running.next_trial() == 0
    assert b"a session" in pickle.dumps(running.exchange.__self__)
    running.close()


def test_trials_are_numbered_up_to_the_budget_and_planned(settings: dict[str, Any]) -> None:
    first = session(settings)
    assert [first.next_trial() for _ in range(4)] == [0, 1, 2, None]
    plan = read_plan(first.sweep_dir, 1)
    assert (plan.metric, plan.interval, plan.reported, plan.resources["threads"]) == ("train/loss", 2, 0, 1)
    assert plan.config.optimizer.learning_rate == first.state.trials[1].settings["optimizer.learning_rate"]
    assert plan.config.run.dir == str(first.sweep_dir / "trials" / "0001")


def test_a_resumed_session_gives_unfinished_trials_first_and_ended_ones_never(settings: dict[str, Any]) -> None:
    """T01, T05."""
    first = session(settings)
    assert [first.next_trial() for _ in range(3)] == [0, 1, 2]
    first.reported(0, report(2, 1.0))
    first.ended(0, "finished")
    failure_file(first.sweep_dir, 1).write_text("out of memory")
    first.failed(1, "unknown")
    first.reported(2, report(2, 0.5))
    second = session(settings)
    assert second.state.trials[1].reason == "out of memory"
    assert [second.next_trial(), second.next_trial()] == [2, None]
    assert read_plan(second.sweep_dir, 2).reported == 2
    assert second.state.trials[2].settings == first.state.trials[2].settings
    third = session(settings, retry_failed=True, budget={"trials": 4})
    assert [third.next_trial() for _ in range(4)] == [1, 2, 3, None]
    assert not failure_file(third.sweep_dir, 1).exists()


def test_the_first_of_several_budgets_ends_a_sweep(settings: dict[str, Any]) -> None:
    tokens = session(settings, budget={"tokens": 25})
    assert tokens.next_trial() == 0
    tokens.reported(0, report(2, 1.0, tokens=20))
    assert not tokens.is_over()
    tokens.reported(0, report(4, 1.0, tokens=30))
    assert tokens.is_over()
    assert tokens.next_trial() is None
    assert session({**settings, "dir": settings["dir"] + "-2"}, budget={"time_s": 1e-9}).next_trial() is None


def test_settings_that_cannot_be_are_a_failed_trial_with_its_reason(settings: dict[str, Any]) -> None:
    """Between the corners that were checked: no multiple of the micro-batch."""
    space = {"training.global_batch_size": {"integers": [2, 4]}}
    found = session(settings, space=space, set={"training.micro_batch_size": 2}, budget={"trials": 9})
    started = [number for number in iter(found.next_trial, None)]
    failed = [trial for trial in found.state.trials.values() if trial.state == "failed"]
    assert failed
    assert len(started) + len(failed) == 9
    assert "must be a multiple of micro_batch_size" in failed[0].reason


def test_an_exchange_copies_checkpoint_and_settings(settings: dict[str, Any]) -> None:
    import torch

    from raylm.training.state import Piece

    pbt = {"name": "pbt", "interval_steps": 2, "resample_probability": 0.0}
    found = session(settings, scheduler=pbt)
    assert [found.next_trial(), found.next_trial()] == [0, 1]
    assert not found.exchange(1, 0, 2)  # nothing to copy yet
    writer = CheckpointWriter(found.trial_dir(0) / "checkpoints", asynchronous=False)
    writer.save({"w": Piece(torch.ones(2), 0, (2,))}, CheckpointMeta(2, {}))
    pin(found.trial_dir(0), found.trial_dir(0) / "checkpoints" / checkpoint_name(2), 2, 0.1, "min")
    assert found.exchange(1, 0, 2)
    assert (copy_folder(found.sweep_dir, 1) / checkpoint_name(2) / "checkpoint.json").is_file()
    donor, copy = (found.state.trials[n].settings["optimizer.learning_rate"] for n in (0, 1))
    assert any(math.isclose(copy, min(max(donor * factor, 1e-5), 1e-3)) for factor in (0.8, 1.25))
    assert read_plan(found.sweep_dir, 1).reported == 2
    assert read_plan(found.sweep_dir, 1).config.optimizer.learning_rate == copy
    assert read_journal(found.sweep_dir).trials[1].copied_from == [(0, 2)]


def with_a_donor(settings: dict[str, Any], **overrides: Any) -> Session:
    """Two trials, of which trial 0 has a checkpoint of step 2."""
    import torch

    from raylm.training.state import Piece

    pbt = {"name": "pbt", "interval_steps": 2, "resample_probability": 0.0}
    found = session(settings, scheduler=pbt, **overrides)
    assert [found.next_trial(), found.next_trial()] == [0, 1]
    writer = CheckpointWriter(found.trial_dir(0) / "checkpoints", asynchronous=False)
    writer.save({"w": Piece(torch.ones(2), 0, (2,))}, CheckpointMeta(2, {}))
    pin(found.trial_dir(0), found.trial_dir(0) / "checkpoints" / checkpoint_name(2), 2, 0.1, "min")
    return found


def test_an_exchange_to_settings_that_cannot_be_changes_nothing(settings: dict[str, Any]) -> None:
    decay = "optimizer.weight_decay"
    space = {decay: {"choice": [0.01, 0.02, -1.0, -2.0]}}
    draws = {seed: RandomSearch(candidates_of(settings, space=space, seed=seed)) for seed in range(50)}
    seed = next(
        seed for seed, draw in draws.items() if all((draw.suggest(n, SweepState()) or {})[decay] > 0 for n in (0, 1))
    )
    found = with_a_donor(settings, space=space, seed=seed)
    found.state.trials[0].settings = {decay: -2.0}
    before, plan = replace(found.state.trials[1]), read_plan(found.sweep_dir, 1)
    assert not found.exchange(1, 0, 2)
    assert found.state.trials[1] == before
    assert before.state == "running"
    assert read_plan(found.sweep_dir, 1) == plan
    assert not list(found.sweep_dir.glob("copies/*"))


@pytest.mark.parametrize("noted", [True, False])
def test_a_copy_at_which_the_driver_died_is_whole_or_not_at_all(settings: dict[str, Any], noted: bool) -> None:
    found = with_a_donor(settings)
    donor = found.trial_dir(0) / "checkpoints" / checkpoint_name(2)
    link_checkpoint(donor, staged_copy(found.sweep_dir, 1, 1) / checkpoint_name(2))
    if noted:
        journal = Journal(found.sweep_dir)
        journal.write("copy", number=1, source=0, step=2, settings={"optimizer.learning_rate": 2e-4})
        journal.close()
    again = session(settings, scheduler={"name": "pbt", "interval_steps": 2})
    assert [path.name for path in again.sweep_dir.glob("copies/*")] == (["0001"] if noted else [])
    assert [again.next_trial(), again.next_trial()] == [0, 1]
    plan = read_plan(again.sweep_dir, 1)
    assert plan.reported == (2 if noted else 0)
    assert (plan.config.optimizer.learning_rate == 2e-4) == noted


def test_a_session_that_ends_knows_its_time_and_that_nothing_runs(settings: dict[str, Any]) -> None:
    found = session(settings)
    found.next_trial()
    found.close()
    assert found.state.seconds > 0
    assert found.state.trials[0].state == "unfinished"


def test_a_sweep_whose_trials_all_fail_ends(settings: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """They use neither time nor tokens up."""
    found = session(settings, budget={"tokens": 100})
    for number in range(3):
        assert found.next_trial() == number
        found.failed(number, "no memory")
    assert found.next_trial() == 3
    found.reported(3, report(2, 1.0, tokens=1))
    found.failed(3, "no memory")
    for number in range(4, 12):
        assert found.next_trial() == number
        found.failed(number, f"no memory for {number}")
    assert found.next_trial() is None
    assert "8 trials in a row failed: no more are started. The last reason: no memory for 11" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.yaml", "--retry-failed"], "--retry-failed: is for a sweep that is resumed"),
        (["--resume", "x", "--dry-run"], "--dry-run: excludes --resume"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", *arguments]) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(ConfigError, match="retry_failed: is for a sweep that is resumed"):
        raylm.sweep({}, retry_failed=True)


def test_a_report_that_its_scheduler_saw_first_is_noted_once(settings: dict[str, Any]) -> None:
    from ray._private.dict import flatten_dict

    found = session(settings)
    found.next_trial()
    for step in (2, 4):
        found.note(0, flatten_dict(report(step, 1.0 / step)))
        found.reported(0, report(step, 1.0 / step))
    (trial,) = read_journal(found.sweep_dir).trials.values()
    assert [(one.step, one.figures) for one in trial.reports] == [(2, {"train/loss": 0.5}), (4, {"train/loss": 0.25})]


def test_a_first_trial_that_cannot_be_costs_no_results(settings: dict[str, Any]) -> None:
    space = {"training.global_batch_size": {"integers": [2, 4]}}
    changes = {"space": space, "set": {"training.micro_batch_size": 2}, "budget": {"trials": 2}}
    seed = next(
        n
        for n in range(20)
        if RandomSearch(candidates_of(settings, seed=n, **changes)).suggest(0, SweepState())
        == {"training.global_batch_size": 3}
    )
    found = session(settings, seed=seed, **changes)
    while found.next_trial() is not None:
        pass
    assert found.state.trials[0].state == "failed"
    candidates = candidates_of(settings, seed=seed, **changes)
    result = finish_sweep(candidates, found.state, interrupted=False, started=0.0)
    assert result.metric == "train/loss"
    assert Path(result.report).is_file()
    elsewhere = candidates.config.model_copy(update={"dir": settings["dir"] + "-2"})
    assert outline_sweep(elsewhere).metric == "train/loss"


def test_retraining_that_fails_costs_nothing_else(settings: dict[str, Any]) -> None:
    """A file that was there when the sweep began is gone at its end."""
    changes = {"retrain_best": True, "retrain_set": {"data.train": "gone.json"}}
    found = session(settings, **changes)
    found.next_trial()
    found.reported(0, report(2, 1.0))
    found.ended(0, "finished")
    result = finish_sweep(candidates_of(settings, **changes), found.state, interrupted=False, started=0.0)
    assert (result.best, result.value, result.retrained_dir) == (0, 1.0, None)
    assert Path(result.results).read_text().count("\n") == 2
    assert "could not be trained again: " in Path(result.report).read_text()
    assert "gone.json: there is no such file" in Path(result.report).read_text()


def test_retraining_goes_on_with_the_same_and_replaces_anything_else(settings: dict[str, Any]) -> None:
    found = candidates_of(settings, retrain_best=True, retrain_set={"training.max_steps": 6})
    best = Report(2, 1.0, 10, 1.0, {}, {"optimizer.learning_rate": 1e-4})
    config = retrain_config(found, best)
    assert (config.training.max_steps, config.training.resume, config.run.overwrite) == (6, None, False)
    open_run_dir(config)
    again = retrain_config(found, best)
    assert (again.training.resume, again.run.overwrite) == ("auto", False)
    open_run_dir(again)
    assert retrain_config(found, best) == again
    other = retrain_config(found, replace(best, settings={"optimizer.learning_rate": 2e-4}))
    assert (other.training.resume, other.run.overwrite) == (None, True)


def test_the_table_shows_settings_steps_best_and_time_left(settings: dict[str, Any]) -> None:
    found = session(settings)
    assert [found.next_trial(), found.next_trial()] == [0, 1]
    found.reported(0, report(2, 1.25))
    found.reported(0, report(4, 1.5))
    found.ended(0, "finished")
    found.trial_dir(1).mkdir(parents=True)
    found.reported(1, report(2, 2.0))
    (found.trial_dir(1) / "metrics.jsonl").write_text(json.dumps({"step": 3, "train/step_s": 7.0}) + "\n")
    view = SweepView(found)
    running, ended = view.rows()
    assert running[:1] + running[2:] == ("1", "running", "3/4", "2", "7 s")
    assert ended[:1] + ended[2:] == ("0", "finished", "4/4", "1.25", "")
    assert ended[1].startswith("optimizer.learning_rate=")
    assert view.summary().startswith("2 of 3 trials: 1 finished, 1 running; best 1.25 (trial 0, step 2); about ")
    found.ended(1, "failed", "no memory")
    assert found.next_trial() == 2
    found.ended(2, "stopped")
    assert view.summary() == "3 of 3 trials: 1 failed, 1 finished, 1 stopped; best 1.25 (trial 0, step 2)"


def test_a_terminal_gets_a_table_and_a_log_gets_lines(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = session(settings)
    found.next_trial()

    terminal = Terminal()
    with watch_sweep(found, terminal):
        pass
    assert "settings" in terminal.getvalue()
    with caplog.at_level("INFO"), watch_sweep(found, io.StringIO()):
        pass
    assert "1 of 3 trials: 1 running" in caplog.text
    monkeypatch.setattr("raylm.tuning.progress.LINE_INTERVAL_S", 0.0)
    found.reported(0, report(2, 1.25))
    caplog.clear()
    with caplog.at_level("INFO"):
        lines = _Lines()
        for _ in range(2):  # the second time nothing has changed
            lines.show(SweepView(found))
    rate = found.state.trials[0].settings["optimizer.learning_rate"]
    assert caplog.messages == [
        "1 of 3 trials: 1 running; best 1.25 (trial 0, step 2)",
        f"  trial 0: running, step 2/4, best 1.25 (optimizer.learning_rate={rate:.4g})",
    ]


def test_before_its_first_step_a_trial_shows_what_it_is_at(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raylm.tuning.progress.LINE_INTERVAL_S", 0.0)
    monkeypatch.setattr("raylm.tuning.progress.LONGEST_INTERVAL_S", 0.0)
    found = session(settings)
    found.next_trial()
    found.trial_dir(0).mkdir(parents=True, exist_ok=True)
    lines, events = _Lines(), EventsWriter(found.trial_dir(0))
    with caplog.at_level("INFO"):
        lines.show(SweepView(found))
        events.write("loading the model")
        lines.show(SweepView(found))
    told = [message for message in caplog.messages if message.startswith("  trial 0")]
    rate = described(found.state.trials[0].settings)
    assert told == [f"  trial 0: starting its workers ({rate})", f"  trial 0: loading the model ({rate})"]


def test_what_is_logged_stands_above_the_table(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found, terminal = session(settings), Terminal()
    monkeypatch.setattr("raylm.tuning.progress.POLL_S", 0.01)
    check_log_stands_above(watch_sweep(found, terminal), terminal, "settings", monkeypatch)


def test_reports_come_at_their_steps_with_the_figures_up_to_them(settings: dict[str, Any], tmp_path: Path) -> None:
    found = session(settings)
    found.next_trial()
    run = tmp_path / "run"
    run.mkdir()
    lines = [
        {"step": step, "train/loss": 4.0 - step, "train/tokens": 10, "train/step_s": 0.5, "memory/host_gib": 1.0 + step}
        for step in (1, 2, 3, 4, 5)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = _Figures(run, read_plan(found.sweep_dir, 0))
    figures.read()
    assert figures.next_step(0, 5, ended=False) == 2
    assert figures.next_step(2, 5, ended=False) == 4
    assert figures.next_step(4, 5, ended=False) == 5
    assert figures.next_step(4, 9, ended=False) is None
    assert figures.next_step(4, 9, ended=True) == 5  # it ended early
    assert figures.totals(4) == (40, 2.0)
    assert figures.at(2) == {**{k: v for k, v in lines[1].items() if "/" in k}, "time_s": 1.0, "memory_gib": 3.0}


@pytest.mark.parametrize(
    ("every", "logged", "step", "steps"),
    [(100, [8], 8, 8), (10, [10, 15], 15, 15), (10, [10, 15], 10, 10), (4, [4, 8, 12], 9, 8), (2, [6, 8], 8, 4)],
)
def test_a_logged_step_stands_for_those_since_the_one_before(
    settings: dict[str, Any], tmp_path: Path, every: int, logged: list[int], step: int, steps: int
) -> None:
    own = {"metrics.log_interval_steps": every, "checkpoint.interval_steps": None}
    found = session({**settings, "set": own})
    found.next_trial()
    lines = [{"step": at, "train/tokens": 10, "train/step_s": 0.5} for at in logged]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = _Figures(tmp_path, read_plan(found.sweep_dir, 0))
    figures.read()
    assert figures.totals(step) == (10 * steps, 0.5 * steps)


def test_a_folder_with_something_in_it_is_left_alone(settings: dict[str, Any], tmp_path: Path) -> None:
    config = load_config(SweepConfig, settings)
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "precious.txt").write_text("x")
    with pytest.raises(RunDirError, match="holds something else than a sweep"):
        run_sweep(config)
    with pytest.raises(RunDirError, match="holds something else than a sweep"):
        outline_sweep(config)
    with pytest.raises(RunDirError, match="holds no sweep"):
        resume_sweep(tmp_path / "sweep")


def test_a_fault_of_a_file_names_the_file(settings: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump({**settings, "metric": "train/los"}))
    for arguments in ([str(file)], [str(file), "--dry-run"]):
        assert main(["sweep", *arguments]) == 2
        error = f"error: {file}: metric: 'train/los' is no figure of a run. Did you mean train/loss?\n"
        assert capsys.readouterr().err == error
