"""Sweeps that are killed, that stop or copy trials, and that lose processes. Run by `make test-slow`."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

import raylm
from raylm.training.checkpoint import verify_checkpoints
from raylm.training.metrics import read_events, read_metrics
from raylm.tuning.journal import JOURNAL_FILE, SweepState, read_journal
from tests.conftest import PAIRS, command_line
from tests.integration.drivers import ROOT
from tests.integration.sweep_support import finished, sweep_process, write_sweep

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def sweep_file(tiny_model_dir: Path, write_dataset: Any, tmp_path: Path) -> Callable[..., Path]:
    data, evaluation = write_dataset(PAIRS), write_dataset(PAIRS[:6], "e.json")
    return lambda **settings: write_sweep(tmp_path, tiny_model_dir, data, evaluation, **settings)


def _wait(folder: Path, wanted: Callable[[SweepState], bool], seconds: float = 400.0) -> SweepState:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        state = read_journal(folder)
        if wanted(state):
            return state
        time.sleep(0.1)
    raise AssertionError(read_journal(folder))


def _lines(folder: Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / JOURNAL_FILE).read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def test_a_killed_sweep_goes_on_as_one(sweep_file: Callable[..., Path], tmp_path: Path) -> None:
    """T01, T05: as many trials as asked for, by the same searcher; what has ended never runs again, what ran goes on
    from its checkpoint."""
    space = {"optimizer.learning_rate": {"loguniform": [1e-4, 1e-2]}, "optimizer.max_grad_norm": {"grid": [1.0, 1e9]}}
    file = sweep_file(search={"name": "optuna", "startup_trials": 2}, budget={"trials": 3}, space=space)
    folder = tmp_path / "sweep"
    driver = sweep_process(str(file))
    before = _wait(
        folder,
        lambda state: (
            any(trial.has_ended for trial in state.trials.values())
            and any(not trial.has_ended and trial.reports for trial in state.trials.values())
        ),
    )
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    time.sleep(1.0)
    before = read_journal(folder)
    ended = {number for number, trial in before.trials.items() if trial.has_ended}
    assert 1 <= len(ended) < 3
    result = finished("--resume", str(folder))
    assert result["states"] == {"finished": 3}
    after = read_journal(folder)
    assert sorted(after.trials) == [0, 1, 2]
    assert len({json.dumps(trial.settings) for trial in after.trials.values()}) == 3
    for number, trial in before.trials.items():
        assert after.trials[number].settings == trial.settings
        assert after.trials[number].reports[: len(trial.reports)] == trial.reports
    starts = [line["number"] for line in _lines(folder, "start")]
    assert all(starts.count(number) == 1 for number in ended)
    for trial in after.trials.values():
        assert [report.step for report in trial.reports] == [3, 6, 9, 12]
        steps = [
            line["step"] for line in read_metrics(folder / "trials" / f"{trial.number:04d}") if "train/loss" in line
        ]
        assert steps == list(range(1, 13))


def test_asha_stops_what_lags_behind_and_frees_its_processes(sweep_file: Callable[..., Path], tmp_path: Path) -> None:
    """T04: workers of stopped trials are gone when the next ones run, and at the end nothing is left."""
    file = sweep_file(
        search="grid",
        seed=2,  # the best comes first
        space={"optimizer.learning_rate": {"choice": [1e-2, 1e-7, 2e-7, 3e-7]}},
        scheduler={"name": "asha", "reduction_factor": 2, "grace_steps": 3},
    )
    driver, seen = sweep_process(str(file), "--json", stderr=subprocess.DEVNULL), set[psutil.Process]()
    most = 0
    while driver.poll() is None:
        children = psutil.Process(driver.pid).children(recursive=True)
        seen |= set(children)
        most = max(most, sum("RayTrainWorker" in command_line(child) for child in children))
        time.sleep(0.5)
    assert driver.stdout is not None
    result = json.loads(driver.stdout.read().splitlines()[-1])
    state = read_journal(tmp_path / "sweep")
    assert result["best"] == 0
    assert 1 <= most <= 3  # two at a time, and one on its way out
    assert state.trials[0].state == "finished"
    stopped = [trial for trial in state.trials.values() if trial.state == "stopped"]
    assert len(stopped) >= 2
    for trial in stopped:
        last = trial.last
        assert last is not None
        assert last.step < 12
        taken = [line["step"] for line in read_metrics(tmp_path / "sweep" / "trials" / f"{trial.number:04d}")]
        assert max(taken) <= last.step + 1  # held there until the decision, which costs one step
    _, alive = psutil.wait_procs(list(seen), timeout=30)
    assert not alive


def test_ctrl_c_ends_a_sweep_that_can_go_on(sweep_file: Callable[..., Path], tmp_path: Path) -> None:
    """T04."""
    folder = tmp_path / "sweep"
    driver = sweep_process(str(sweep_file(budget={"trials": 3})), "--json", start_new_session=True)
    _wait(folder, lambda state: any(trial.reports for trial in state.trials.values()))
    children = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGINT)
    out, _ = driver.communicate(timeout=120)
    assert driver.returncode == 0
    result = json.loads(out.splitlines()[-1])
    assert result["interrupted"]
    assert result["checkpoint"] is not None
    assert Path(result["report"]).is_file()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    assert not all(trial.has_ended for trial in read_journal(folder).trials.values())


@pytest.mark.usefixtures("ray_cluster")
def test_a_population_copies_checkpoints_and_settings(sweep_file: Callable[..., Path], tmp_path: Path) -> None:
    """The worst goes on from the best's weights: its loss after the copy is near the best's."""
    file = sweep_file(
        space={"optimizer.learning_rate": {"loguniform": [1e-8, 1e-2]}},
        seed=45,  # draws 8.3e-3 and 3.2e-8
        set={"training.max_steps": 90, "training.num_epochs": 99},  # so many that both run at the same time for a while
        scheduler={"name": "pbt", "interval_steps": 3, "quantile": 0.5, "resample_probability": 0.0},
        budget={"trials": 2},
    )
    result = raylm.sweep(file)
    state = read_journal(tmp_path / "sweep")
    assert result.states == {"finished": 2}
    copied = state.trials[1].copied_from
    assert copied
    assert copied[0][0] == 0
    first = state.trials[1].reports[0]
    after = next(report for report in state.trials[1].reports if report.settings != first.settings)
    donor = {report.step: report.value for report in state.trials[0].reports}
    assert after.step > copied[0][1]
    assert abs(after.value - donor[after.step]) < 0.25 * abs(first.value - donor[after.step])
    source = state.trials[0].reports[0].settings["optimizer.learning_rate"]
    assert after.settings["optimizer.learning_rate"] in (source * 0.8, 1e-2)
    assert [report.problem for report in verify_checkpoints(tmp_path / "sweep" / "best" / "checkpoints")] == [""]


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("name", ["hyperband", "median_stop"])
def test_other_schedulers_end_with_the_best(sweep_file: Callable[..., Path], tmp_path: Path, name: str) -> None:
    """HyperBand's first bracket, of three trials here, has all the steps; the others are halved."""
    options = {"hyperband": {"reduction_factor": 3, "max_steps": 12}, "median_stop": {"min_trials": 2}}[name]
    rates = [1e-2, 5e-3, 1e-7, *([4e-3, 2e-7, 3e-7] if name == "hyperband" else [])]
    file = sweep_file(
        search="grid",
        seed=2,  # in this order
        budget={},
        space={"optimizer.learning_rate": {"choice": rates}},
        scheduler={"name": name, **options},
    )
    result = raylm.sweep(file)
    assert result.settings["optimizer.learning_rate"] > 1e-3
    assert set(result.states) == {"finished", "stopped"}
    assert sum(result.states.values()) == len(rates)
    trials = read_journal(Path(result.sweep_dir)).trials.values()
    stopped = [trial for trial in trials if trial.state == "stopped"]
    assert all(trial.reports[-1].step < 12 for trial in stopped)
    assert any(trial.settings["optimizer.learning_rate"] < 1e-6 for trial in stopped)


@pytest.mark.usefixtures("ray_cluster")
def test_a_lost_worker_costs_its_trial_and_no_other(sweep_file: Callable[..., Path], tmp_path: Path) -> None:
    """A trial whose workers die fails with the reason; asked to, the sweep tries it again from its checkpoint."""
    import threading

    base = {"cluster.max_failures": 0}
    file = sweep_file(budget={"trials": 2}, set=base, search="random")
    folder = tmp_path / "sweep"
    killed: list[int] = []

    def kill() -> None:
        _wait(folder, lambda state: bool(state.trials) and bool(state.trials[0].reports))
        mark = json.loads((folder / "trials" / "0000" / "ranks" / "00000.json").read_text())
        os.kill(mark["pid"], signal.SIGKILL)
        killed.append(mark["pid"])

    killer = threading.Thread(target=kill)
    killer.start()
    result = raylm.sweep(file)
    killer.join()
    assert killed
    assert result.states == {"failed": 1, "finished": 1}
    assert "workers were lost" in read_journal(folder).trials[0].reason
    assert raylm.sweep(resume=folder).states == {"failed": 1, "finished": 1}
    again = raylm.sweep(resume=folder, retry_failed=True)
    assert again.states == {"finished": 2}
    assert [report.step for report in read_journal(folder).trials[0].reports] == [3, 6, 9, 12]


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("setting", "state", "reason"),
    [
        ({"training.max_time_s": 0.01}, "finished", "training.max_time_s is over"),
        (
            {
                "metrics": {
                    "sinks": ["mlflow"],
                    "mlflow": {"tracking_uri": "http://127.0.0.1:9"},
                    "on_sink_failure": "stop",
                },
                "training.max_steps": 2000,
                "training.num_epochs": 999,
            },
            "failed",
            "mlflow takes no figures (metrics.on_sink_failure=stop)",
        ),
    ],
)
def test_a_trial_that_ends_early_says_why_and_its_best_counts(
    sweep_file: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    setting: dict[str, Any],
    state: str,
    reason: str,
) -> None:
    monkeypatch.setattr("raylm.training.sinks.follow.CLOSING_S", 4.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    each = {"checkpoint.interval_steps": 1, "training.eval_interval_steps": None, **setting}
    result = raylm.sweep(sweep_file(budget={"trials": 1}, metric="train/loss", set=each))
    trial = read_journal(tmp_path / "sweep").trials[0]
    assert (trial.state, trial.reason) == (state, reason)
    assert trial.last is not None
    assert trial.last.step < (trial.num_steps or 0)
    assert result.best == 0
    assert result.checkpoint is not None
    assert reason in Path(result.results).read_text()
    assert read_events(tmp_path / "sweep" / "trials" / "0000")[-1]["phase"] == "stopped"


def test_a_lost_trial_gives_back_what_it_held(sweep_file: Callable[..., Path], tmp_path: Path) -> None:
    """The process that a trial is, not one of its workers, on a Ray of the sweep's own with room for one trial."""
    file = sweep_file(budget={"trials": 2}, concurrency=1, search="random", resources={"cpus_per_worker": 1})
    folder = tmp_path / "sweep"
    driver = sweep_process(str(file), "--json")
    try:
        _wait(folder, lambda state: bool(state.trials) and bool(state.trials[0].reports))
        own = psutil.Process(driver.pid).children(recursive=True)
        titles = {" ".join(process.cmdline()): process for process in own}
        trials = [title for title in titles if title.startswith("ray::ResourceTrainable")]  # Tune's name for it
        assert len(trials) == 1, sorted(titles)
        titles[trials[0]].kill()
        output, errors = driver.communicate(timeout=300)
        assert driver.returncode == 0, errors[-3000:]
        assert json.loads(output.splitlines()[-1])["states"] == {"failed": 1, "finished": 1}
    finally:
        driver.kill()


def test_the_job_form_trains_the_best_again(sweep_file: Callable[..., Path], tmp_path: Path) -> None:
    """Two workers a trial, relative paths, going on from another folder, and the best trained again for longer."""
    tree = yaml.safe_load(sweep_file().read_text())
    data = tree["base"]["data"]
    for key in ("train", "eval"):
        data[key] = str(Path(data[key]).relative_to(tmp_path))
    tree |= {"budget": {"trials": 1}, "concurrency": 1, "resources": {"num_workers": 2, "cpus_per_worker": 1}}
    tree |= {"retrain_best": True, "retrain_set": {"training.max_steps": 15}, "export_best": True}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(tree))

    def job(where: Path, *arguments: str) -> dict[str, Any]:
        line = [sys.executable, "-m", "jobs.sweep", *arguments, "--json"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(line, cwd=where, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]
        return dict(json.loads(done.stdout.splitlines()[-1]))

    first = job(tmp_path, "sweep.yaml")
    assert first["states"] == {"finished": 1}
    folder = tmp_path / "sweep"
    event = next(line for line in read_events(folder / "trials" / "0000") if "workers" in line)
    assert event["workers"] == 2
    retrained = Path(first["retrained_dir"])
    assert max(line["step"] for line in read_metrics(retrained)) == 15
    assert (retrained / "export" / "model.safetensors").is_file()
    assert (folder / "best" / "export" / "model.safetensors").is_file()
    (tmp_path / "elsewhere").mkdir()
    again = job(tmp_path / "elsewhere", "--resume", str(folder), "budget.trials=2")
    assert again["states"] == {"finished": 2}
    assert read_journal(folder).folder == str(tmp_path)
