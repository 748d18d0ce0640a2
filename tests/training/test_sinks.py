"""Figures in real trackers, offline: event files, a wandb log, an MLflow database."""

import contextlib
import importlib.util
import json
import logging
import sys
import time
import typing
from pathlib import Path
from typing import Any

import pytest

import raylm
from raylm.config import TrainConfig, load_config
from raylm.config.metrics import SinkName
from raylm.errors import ConfigError
from raylm.training.metrics import EventsWriter, read_metrics
from raylm.training.sinks import follow
from raylm.training.sinks.follow import send_figures
from raylm.training.sinks.secrets import without_secrets
from raylm.training.sinks.table import SINKS, check_sinks
from tests.training.sink_support import SECRET, make_run, recorded, take_steps, wait_for

pytestmark = pytest.mark.usefixtures("own_trackers")


def wandb_records(run_dir: Path) -> list[Any]:
    """The records of all sessions of a run, from wandb's own log: blocks of 32 KiB as in LevelDB, each record behind
    7 bytes of checksum, length and type."""
    from wandb.proto import wandb_internal_pb2 as protocol

    records = []
    for path in sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb")):
        log, place, whole = path.read_bytes(), 7, b""
        while place + 7 <= len(log):
            if 32768 - place % 32768 < 7:
                place += 32768 - place % 32768
                continue
            length, kind = int.from_bytes(log[place + 4 : place + 6], "little"), log[place + 6]
            whole = (b"" if kind in (1, 2) else whole) + log[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):
                record = protocol.Record()
                record.ParseFromString(whole)
                records.append(record)
    return records


def wandb_history(run_dir: Path) -> list[dict[str, Any]]:
    rows = [record.history for record in wandb_records(run_dir) if record.WhichOneof("record_type") == "history"]
    return [{".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row.item} for row in rows]


def mlflow_client(run_dir: Path) -> Any:
    from mlflow import MlflowClient

    uri = f"sqlite:///{run_dir / 'mlflow.db'}"
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def test_every_name_of_the_configuration_is_a_row() -> None:
    assert typing.get_args(SinkName) == tuple(SINKS)


def test_tensorboard_gets_each_figure_once_over_sessions(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_run(tmp_path)
    with send_figures(config, tmp_path):
        take_steps(tmp_path, 0, 5, evaluate_at=5)
    with send_figures(config, tmp_path):
        take_steps(tmp_path, 3, 7)  # killed after step 5, gone on with from the checkpoint of step 3
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(point.step, pytest.approx(1 / point.step)) for point in board.Scalars("train/loss")] == [
        (step, point.value) for step, point in zip(range(1, 8), board.Scalars("train/loss"), strict=True)
    ]
    assert [point.step for point in board.Scalars("eval/loss")] == [5]


def test_wandb_offline_goes_on_with_the_same_run(tmp_path: Path) -> None:
    settings = [
        "metrics.sinks=[wandb]",
        "metrics.wandb.mode=offline",
        "metrics.project=shapes",
        "metrics.run_name=first try",
        "metrics.group=sweep",
        "metrics.tags=[baseline, team=nlp]",
    ]
    config = make_run(tmp_path, *settings)
    with send_figures(config, tmp_path):
        take_steps(tmp_path, 0, 4, evaluate_at=4)
    time.sleep(1.1)  # wandb names the folder of a session by the second
    with send_figures(config, tmp_path):
        take_steps(tmp_path, 2, 6)
    history = wandb_history(tmp_path)
    assert [row["_step"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert [row["train/loss"] for row in history] == pytest.approx([1 / step for step in range(1, 7)])
    assert [row["eval/loss"] for row in history if "eval/loss" in row] == [0.5]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert history[4]["_timestamp"] == pytest.approx(
        next(line["time"] for line in lines if line["step"] == 5), abs=0.01
    )
    runs = [record.run for record in wandb_records(tmp_path) if record.WhichOneof("record_type") == "run"]
    assert {(run.run_id, run.project, run.display_name, run.run_group, tuple(run.tags)) for run in runs} == {
        (recorded(tmp_path, "wandb")["run_id"], "shapes", "first try", "sweep", ("baseline", "team=nlp"))
    }
    config_items = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert config_items["model"]["path"] == "some/model"


def test_mlflow_writes_a_database_of_the_run(tmp_path: Path) -> None:
    settings = [
        "metrics.sinks=[mlflow]",
        "metrics.run_name=one",
        "metrics.group=g",
        "metrics.tags=[baseline, team=nlp]",
    ]
    config = make_run(tmp_path, *settings)
    with send_figures(config, tmp_path):
        take_steps(tmp_path, 0, 4, evaluate_at=4)
    client, run_id = mlflow_client(tmp_path), recorded(tmp_path, "mlflow")["run_id"]
    assert client.get_run(run_id).info.status == "FINISHED"
    changed = make_run(tmp_path, *settings, "training.resume=auto", "training.max_steps=6")
    with contextlib.suppress(KeyboardInterrupt), send_figures(changed, tmp_path):
        take_steps(tmp_path, 2, 6)
        raise KeyboardInterrupt
    (experiment,) = [found for found in client.search_experiments() if found.name == "raylm"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (run_id, "one", "FAILED")
    points = client.get_metric_history(run_id, "train/loss")
    assert [(point.step, point.value) for point in points] == [(step, 1 / step) for step in range(1, 7)]
    assert [point.step for point in client.get_metric_history(run_id, "eval/loss")] == [4]
    times = {line["step"]: line["time"] for line in read_metrics(tmp_path)}
    assert points[5].timestamp == round(times[6] * 1000)
    assert run.data.params["model.path"] == "some/model"
    assert run.data.params["training.max_steps"] == "null", "a parameter of MLflow never changes"
    assert {name: run.data.tags[name] for name in ("baseline", "team", "group")} == {
        "baseline": "true",
        "team": "nlp",
        "group": "g",
    }


def test_a_restarted_worker_sends_nothing_twice(tmp_path: Path) -> None:
    """metrics.jsonl is rewritten without the steps after the checkpoint while the sink reads it."""
    config = make_run(tmp_path, "metrics.sinks=[mlflow]")
    with send_figures(config, tmp_path):
        take_steps(tmp_path, 0, 6)
        wait_for(lambda: recorded(tmp_path, "mlflow")["sent"]["train/loss"] == 6)
        take_steps(tmp_path, 3, 9, evaluate_at=4)
    client, run_id = mlflow_client(tmp_path), recorded(tmp_path, "mlflow")["run_id"]
    assert [point.step for point in client.get_metric_history(run_id, "train/loss")] == list(range(1, 10))
    assert [point.step for point in client.get_metric_history(run_id, "eval/loss")] == [4]


def test_a_run_without_steps_leaves_nothing_in_trackers(tmp_path: Path) -> None:
    config = make_run(tmp_path, "metrics.sinks=[mlflow, wandb, tensorboard]", "metrics.wandb.mode=offline")
    with send_figures(config, tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == ["config.yaml"]


def test_no_secret_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: Any
) -> None:
    """Z01: planted in every place where credentials are, with sinks that work and sinks that fail."""
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr(sys, "argv", ["train.py", f"--token={SECRET}"])
    caplog.set_level(logging.DEBUG, "raylm")
    run_dir = tmp_path / "runs" / "one"
    works = make_run(run_dir, "metrics.sinks=[mlflow, wandb, tensorboard]", "metrics.wandb.mode=offline")
    with send_figures(works, run_dir):
        take_steps(run_dir, 0, 3)
        EventsWriter(run_dir).write("done")
    assert len(wandb_history(run_dir)) == 3
    monkeypatch.setattr(follow, "CLOSING_S", 6.0)
    monkeypatch.setattr("raylm.training.sinks.wandb.INIT_TIMEOUT_S", 2.0)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:9")
    fails = make_run(run_dir, "metrics.sinks=[mlflow, wandb]", "training.resume=auto", "metrics.project=other")
    with send_figures(fails, run_dir) as following:
        take_steps(run_dir, 3, 5)
    assert set(following.lacking) == {"mlflow", "wandb"}
    holding = [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert holding == []
    said = capfd.readouterr()
    assert SECRET not in caplog.text + said.out + said.err + repr(following.lacking)
    with pytest.raises(ConfigError) as refused:
        make_run(tmp_path / "two", "metrics.sinks=[mlflow]", f"metrics.mlflow.tracking_uri=http://me:{SECRET}@host")
    assert "holds credentials" in str(refused.value)
    assert SECRET not in str(refused.value)
    assert not (tmp_path / "two").exists()


def test_addresses_in_messages_lose_their_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "abcdefgh")
    monkeypatch.setenv("SHORT_KEY", "a")
    assert without_secrets("at http://me:p%40ss@host:5/x with abcdefgh") == "at http://host:5/x with ***"


def test_what_is_missing_is_refused_before_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def section(*overrides: str) -> Any:
        base = {"model": {"path": "m"}, "data": {"train": "d"}}
        return load_config(TrainConfig, base, overrides).metrics

    check_sinks(section("metrics.sinks=[tensorboard, wandb, mlflow]", "metrics.wandb.mode=offline"))
    with pytest.raises(ConfigError, match=r"wandb has no API key\. Set WANDB_API_KEY, call `wandb login`, or set"):
        check_sinks(section("metrics.sinks=[wandb]"))
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("wandb", "sqlalchemy") else real(name)
    )
    with pytest.raises(ConfigError, match=r"wandb is not installed\. Install it: pip install 'raylm\[tracking\]'"):
        check_sinks(section("metrics.sinks=[wandb]"))
    with pytest.raises(ConfigError, match=r"mlflow needs sqlalchemy to write a database\. Install it: pip install"):
        check_sinks(section("metrics.sinks=[mlflow]"))
    check_sinks(section("metrics.sinks=[mlflow]", "metrics.mlflow.tracking_uri=https://tracking.example"))
    settings = {"model.path": "m", "data.train": "d", "run.dir": str(tmp_path / "run"), "metrics.sinks": ["wandb"]}
    with pytest.raises(ConfigError, match="wandb is not installed"):
        raylm.train(settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("metrics.sinks=[comet]", "metrics.sinks.0='comet' is not valid"),
        ("metrics.sinks=[wandb, wandb]", "a sink is named twice"),
        ("metrics.wandb.mode=offline", r"section metrics.wandb needs wandb in metrics.sinks. Name it there"),
        ("metrics.tensorboard=false", "unknown key metrics.tensorboard"),
        ("metrics.project=a/b", "a project's name cannot hold '/'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_run(tmp_path, override)
