"""`raylm.sweep` on a real Ray: trials, a failing one, the best checkpoint, what is left behind."""

import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest

import raylm
from raylm.config import TrainConfig, load_config
from raylm.errors import ClusterError, ConfigError, RunDirError
from raylm.training.checkpoint import read_meta, verify_checkpoints
from raylm.training.metrics import read_events, read_metrics
from raylm.tuning.journal import read_journal
from tests.conftest import PAIRS

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def settings(tiny_model_dir: Path, write_dataset: Any, tmp_path: Path) -> dict[str, Any]:
    return {
        "base": {
            "model": {"path": str(tiny_model_dir)},
            "data": {"train": str(write_dataset(PAIRS)), "eval": str(write_dataset(PAIRS[:6], "e.json"))},
            "training": {"global_batch_size": 4, "max_steps": 4, "num_epochs": 9, "eval_interval_steps": 1},
            "optimizer": {"max_grad_norm": 1e9},
            "metrics": {"sinks": []},
        },
        "set": {"data.max_seq_len": 64, "training.precision": "fp32", "schedule.name": "constant"},
        "dir": str(tmp_path / "sweep"),
        "space": {"optimizer.learning_rate": {"grid": [3e-2, 1e30, 1e-5]}},
        "search": "grid",
        "concurrency": 2,
    }


@pytest.mark.slow
def test_a_sweep_survives_a_failing_trial_and_keeps_the_best(settings: dict[str, Any], ray_cluster: Any) -> None:
    """T02: the best is the best ever, with its checkpoint. T04: no actor or placement group is left."""
    result = raylm.sweep(settings)
    sweep = Path(result.sweep_dir)
    assert result.states == {"finished": 2, "failed": 1}
    assert not result.interrupted
    state = read_journal(sweep)
    failed = state.trials[1]
    assert failed.settings == {"optimizer.learning_rate": 1e30}
    assert "the gradient norm nan; the weights were not updated" in failed.reason
    evaluations = {
        number: {
            line["step"]: line["eval/loss"]
            for line in read_metrics(sweep / "trials" / f"{number:04d}")
            if "eval/loss" in line
        }
        for number in (0, 2)
    }
    value, number, step = min((loss, n, s) for n, found in evaluations.items() for s, loss in found.items())
    assert (result.best, result.step, result.value) == (number, step, value)
    assert {s: report.value for s in (1, 2, 3, 4) for report in state.trials[0].reports if report.step == s} == (
        evaluations[0]
    )
    assert result.checkpoint is not None
    assert read_meta(Path(result.checkpoint)).step == step
    (kept,) = verify_checkpoints(Path(result.checkpoint).parent)
    assert not kept.problem
    assert not list((sweep / "trials" / "0002").glob("checkpoints/step-*"))  # not the best: nothing is kept of it
    assert (sweep / "best" / "export" / "model.safetensors").is_file()
    best = load_config(TrainConfig, sweep / "best.yaml")
    assert best.optimizer.learning_rate == 3e-2
    assert best.export.enabled
    assert best.run.dir == str(sweep / "retrained")
    for folder in (sweep / "trials").iterdir():
        assert "tokenising" not in [event["phase"] for event in read_events(folder)]
    rows = list(csv.DictReader(Path(result.results).read_text().splitlines()))
    assert rows[0]["trial"] == "0"
    assert {row["state"] for row in rows} == {"finished", "failed"}
    assert (sweep / "losses.png").read_bytes()[:4] == b"\x89PNG"
    page = (sweep / "report.html").read_text()
    assert "that any trial ever reported" in page
    assert "the loss is" in page
    _nothing_is_left(ray_cluster)
    with pytest.raises(RunDirError, match=r"holds another sweep.*--resume"):
        raylm.sweep(settings)
    before = (sweep / "journal.jsonl").read_text()
    again = raylm.sweep(resume=sweep)
    assert (again.best, again.step) == (result.best, result.step)
    starts = [line for line in (sweep / "journal.jsonl").read_text().splitlines() if '"start"' in line]
    assert len(starts) == 3 == before.count('"start"')


def _nothing_is_left(ray: Any) -> None:
    """Groups and the CPUs they held; killed processes take a moment to be noticed."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        groups = ray.util.placement_group_table().values()
        if all(group["state"] == "REMOVED" for group in groups) and ray.available_resources().get("CPU") == 6:
            return
        time.sleep(0.2)
    raise AssertionError((ray.available_resources(), list(groups)))


def test_what_the_cluster_has_no_room_for_is_told_at_once(settings: dict[str, Any]) -> None:
    started = time.monotonic()
    with pytest.raises(ClusterError, match="no node has 1 CPU and 1 GPU"):
        raylm.sweep(settings, {"resources.gpus_per_worker": 1})
    with pytest.raises(ClusterError, match=r"9 trials at a time: 18 CPUs .* the cluster has 6"):
        raylm.sweep(settings, {"concurrency": 9})
    assert time.monotonic() - started < 30


def test_a_resumed_sweep_must_say_the_same(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="holds no sweep"):
        raylm.sweep(resume=tmp_path)
    folder = Path(settings["dir"])
    with pytest.raises(ClusterError):
        raylm.sweep(settings, {"concurrency": 9})
    with pytest.raises(ConfigError, match="space: differs from what the sweep began with"):
        raylm.sweep(resume=folder, overrides={"space.optimizer.learning_rate": {"grid": [1.0]}})
    assert json.loads((folder / "journal.jsonl").read_text() or "{}") == {}
