"""Runs that leave figures without training, for trackers to take."""

import json
import time
from pathlib import Path
from typing import Any

from raylm.config import TrainConfig, load_config
from raylm.training.metrics import MetricsWriter
from raylm.training.run_dir import open_run_dir

SECRET = "0123456789abcdef0123planted-secret-4567abc"


def make_run(run_dir: Path, *overrides: str) -> TrainConfig:
    base = {"model": {"path": "some/model"}, "data": {"train": "d.json"}, "run": {"dir": str(run_dir)}}
    config = load_config(TrainConfig, base, overrides)
    open_run_dir(config)
    return config


def take_steps(run_dir: Path, start: int, end: int, *, evaluate_at: int = 0) -> None:
    writer = MetricsWriter(run_dir, start_step=start)
    for step in range(start + 1, end + 1):
        writer.write(step, {"train/loss": 1 / step, "train/tokens": 100 * step})
        if step == evaluate_at:
            writer.write(step, {"eval/loss": 2 / step})
    writer.close()


def recorded(run_dir: Path, sink: str) -> dict[str, Any]:
    return dict(json.loads((run_dir / "tracking" / f"{sink}.json").read_text()))


def wait_for(condition: Any, seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except (OSError, KeyError):
            pass
        time.sleep(0.02)
    raise AssertionError("it did not happen")
