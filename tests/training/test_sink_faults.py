"""Trackers that refuse figures, or are away: what they lack is sent later."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

from raylm.errors import RunDirError, TrackingError
from raylm.training.metrics import EventsWriter, read_metrics
from raylm.training.sinks import follow
from raylm.training.sinks.base import Figures, RunInfo
from raylm.training.sinks.follow import send_figures, send_run
from raylm.training.stopping import STOP_FILE
from tests.training.sink_support import SECRET, make_run, recorded, take_steps, wait_for

pytestmark = pytest.mark.usefixtures("own_trackers")


class Unreliable:
    """A sink that refuses as often as told, and keeps what it takes."""

    refusals = 0
    taken: typing.ClassVar[list[Figures]] = []
    ends: typing.ClassVar[list[str]] = []

    def __init__(self, info: RunInfo) -> None:
        self.place = "here"

    @staticmethod
    def check(section: Any) -> None:
        pass

    def open(self, run_id: str | None) -> str:
        return run_id or "new"

    def write(self, lines: list[Figures]) -> None:
        if Unreliable.refusals > 0:
            Unreliable.refusals -= 1
            raise ConnectionError(f"http://me:{SECRET}@host is away\nfor long")
        Unreliable.taken += lines

    def close(self, status: str) -> None:
        if Unreliable.refusals > 0:
            raise ConnectionError("away at the end")
        Unreliable.ends.append(status)


@pytest.fixture
def unreliable(monkeypatch: pytest.MonkeyPatch) -> type[Unreliable]:
    monkeypatch.setattr(follow, "sink_class", lambda name: Unreliable)
    monkeypatch.setattr(follow, "LONGEST_PAUSE_S", 0.05)
    Unreliable.refusals, Unreliable.taken, Unreliable.ends = 0, [], []
    return Unreliable


def test_what_a_sink_refuses_it_gets_later(
    tmp_path: Path, unreliable: type[Unreliable], caplog: pytest.LogCaptureFixture
) -> None:
    config = make_run(tmp_path)
    unreliable.refusals = 3
    with send_figures(config, tmp_path) as following:
        take_steps(tmp_path, 0, 2)
        wait_for(lambda: unreliable.refusals == 0)
        take_steps(tmp_path, 2, 4)
    assert [line.step for line in unreliable.taken] == [1, 2, 3, 4]
    assert unreliable.ends == ["finished"]
    assert not following.lacking
    (message,) = caplog.messages
    assert message == (
        "metrics.sinks: tensorboard takes no figures: ConnectionError: http://host is away. "
        "Training goes on; they are sent once it takes them"
    )
    assert not (tmp_path / STOP_FILE).exists()


def test_a_run_stops_for_a_sink_when_asked_to(tmp_path: Path, unreliable: type[Unreliable]) -> None:
    config = make_run(tmp_path, "metrics.on_sink_failure=stop")
    unreliable.refusals = 1
    with send_figures(config, tmp_path) as following:
        take_steps(tmp_path, 0, 2)
        wait_for(lambda: (tmp_path / STOP_FILE).exists())
        (tmp_path / "stopped.txt").write_text("it was asked to stop")
    assert following.failure == "tensorboard takes no figures (metrics.on_sink_failure=stop)"
    assert unreliable.ends == ["stopped"]


def test_what_sinks_lack_is_sent_when_the_run_is_over(
    tmp_path: Path, unreliable: type[Unreliable], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "CLOSING_S", 1.0)
    config = make_run(tmp_path)
    with pytest.raises(RunDirError, match="holds no run that took a step"):
        send_run(config, tmp_path)
    unreliable.refusals = 1000
    with send_figures(config, tmp_path) as following:
        take_steps(tmp_path, 0, 3)
        EventsWriter(tmp_path).write("done")
    assert following.lacking == {"tensorboard": "ConnectionError: http://host is away"}
    assert unreliable.ends == []
    with pytest.raises(TrackingError, match="tensorboard: takes no figures: ConnectionError: http://host is away"):
        send_run(config, tmp_path)
    unreliable.refusals = 0
    send_run(config, tmp_path)
    send_run(config, tmp_path)
    assert [line.step for line in unreliable.taken] == [1, 2, 3]
    assert unreliable.ends == ["finished"]


def test_a_sink_that_was_away_at_the_end_hears_of_it_later(tmp_path: Path, unreliable: type[Unreliable]) -> None:
    config = make_run(tmp_path)
    with send_figures(config, tmp_path) as following:
        take_steps(tmp_path, 0, 3)
        wait_for(lambda: recorded(tmp_path, "tensorboard")["sent"]["train/loss"] == 3)
        EventsWriter(tmp_path).write("stopped")
        unreliable.refusals = 1
    assert following.lacking == {"tensorboard": "ConnectionError: away at the end"}
    unreliable.refusals = 0
    send_run(config, tmp_path)
    send_run(config, tmp_path)
    assert unreliable.ends == ["stopped"]
    assert [line.step for line in unreliable.taken] == [1, 2, 3]


def test_another_place_is_another_run(tmp_path: Path) -> None:
    """Figures that were tracked offline go to a server in whole."""
    record = follow._Record(tmp_path / "tracking" / "x.json", "here")
    record.opened("one")
    with record.sending([Figures(4, 0.0, {"a": 1.0})]):
        pass
    lines = [{"step": 4, "a": 1.0}, {"step": 5, "a": 1.0}, {"step": 5, "a": 1.0}]
    assert [line.step for line in follow._Record(tmp_path / "tracking" / "x.json", "here").unsent(lines)] == [5]
    elsewhere = follow._Record(tmp_path / "tracking" / "x.json", "there")
    assert elsewhere.run_id is None
    assert [line.step for line in elsewhere.unsent(lines)] == [4, 5]


@pytest.mark.slow
def test_a_server_that_goes_away_and_comes_back_misses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """MLflow's own server, killed in the middle of a run and started again on the same database."""
    from mlflow import MlflowClient

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(follow, "LONGEST_PAUSE_S", 0.5)
    uri = f"http://127.0.0.1:{port}"
    run_dir = tmp_path / "run"
    config = make_run(run_dir, "metrics.sinks=[mlflow]", f"metrics.mlflow.tracking_uri={uri}")
    server = _mlflow_server(tmp_path, port)
    try:
        with send_figures(config, run_dir) as following:
            take_steps(run_dir, 0, 3)
            wait_for(lambda: recorded(run_dir, "mlflow")["sent"]["train/loss"] == 3)
            _kill(server)
            take_steps(run_dir, 3, 6)  # returns at once
            wait_for(lambda: bool(caplog.messages))
            server = _mlflow_server(tmp_path, port)
            take_steps(run_dir, 6, 8)
        client = MlflowClient(tracking_uri=uri)
        run = client.get_run(recorded(run_dir, "mlflow")["run_id"])
        points = client.get_metric_history(run.info.run_id, "train/loss")
    finally:
        _kill(server)
    assert not following.lacking
    assert run.info.status == "FINISHED"
    assert [point.step for point in points] == list(range(1, 9))
    times = {line["step"]: line["time"] for line in read_metrics(run_dir)}
    assert [point.timestamp for point in points] == [round(times[step] * 1000) for step in range(1, 9)]
    (message,) = caplog.messages
    assert message.startswith("metrics.sinks: mlflow takes no figures: MlflowException: API request to")


def _mlflow_server(folder: Path, port: int) -> subprocess.Popen[bytes]:
    database = ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
    command = [sys.executable, "-m", "mlflow", "server", *database, "--port", str(port), "--workers", "1"]
    server = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=(folder / "server.log").open("ab"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )

    def answers() -> bool:
        assert server.poll() is None, (folder / "server.log").read_text()
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True

    wait_for(answers, seconds=180)
    return server


def _kill(server: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()
