"""Trackers get each trial as a run of its own."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from raylm.config import TrainConfig, load_config
from raylm.tuning.trackers import Trackers, _Failed


def test_each_trial_is_a_run_that_ends_as_it_did(tmp_path: Path) -> None:
    trackers = Trackers()
    for number in (0, 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        config = load_config(TrainConfig, {"model.path": "m", "data.train": "d", "run.dir": str(folder)})
        trackers.start(number, config)
        trackers.start(number, config)  # goes on: nothing new
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "time": 1.0, "train/loss": 2.0}) + "\n")
    trackers.end(0, failed=True)
    trackers.end(7, failed=False)
    trackers.close()
    for number in (0, 1):
        record = json.loads((tmp_path / str(number) / "tracking" / "tensorboard.json").read_text())
        assert record["sent"] == {"train/loss": 1}
        assert record["closed"]


def test_sinks_hear_which_trial_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, bool] = {}

    @contextmanager
    def following(config: TrainConfig, run_dir: Path) -> Iterator[Any]:
        try:
            yield None
        except _Failed:
            told[run_dir.name] = True
            raise
        told[run_dir.name] = False

    monkeypatch.setattr("raylm.tuning.trackers.send_figures", following)
    trackers = Trackers()
    for number in (0, 1, 2):
        trackers.start(
            number, load_config(TrainConfig, {"model.path": "m", "data.train": "d", "run.dir": f"/r/{number}"})
        )
    trackers.end(0, failed=True)
    trackers.end(1, failed=False)
    trackers._followed.clear()  # what follows here has no sinks to ask
    trackers.close()
    assert told == {"0": True, "1": False, "2": False}
