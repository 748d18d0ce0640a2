"""Faults of whole runs on Ray: what happened to a worker, and that the run ends as if nothing had."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import raylm
from raylm.errors import TrainingError
from raylm.training.metrics import read_metrics
from tests.conftest import PAIRS, command_line

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture
def settings(tiny_model_dir: Path, write_dataset: Any) -> dict[str, Any]:
    return {
        "model.path": str(tiny_model_dir),
        "data.train": str(write_dataset(PAIRS)),
        "data.max_seq_len": 64,
        "training": {"num_epochs": 12, "global_batch_size": 4, "precision": "fp32"},
        "optimizer.learning_rate": 1e-3,
        "checkpoint.interval_steps": 3,
        "metrics.tensorboard": False,
        "export.enabled": False,
        "cluster": {"num_workers": 2, "cpus_per_worker": 1, "stuck_timeout_s": 20},
    }


def _losses(run_dir: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run_dir) if "train/loss" in line]


def _signal_once(run_dir: Path, rank: int, number: int) -> list[int]:
    """Sends a signal to a rank's process after seven steps; the list it returns holds its id then."""
    sent: list[int] = []

    def send() -> None:
        while len(_losses(run_dir)) < 7:
            time.sleep(0.02)
        process = psutil.Process(json.loads((run_dir / "ranks" / f"{rank:05d}.json").read_text())["pid"])
        assert "RayTrainWorker" in command_line(process)
        os.kill(process.pid, number)
        sent.append(process.pid)

    threading.Thread(target=send, daemon=True).start()
    return sent


def test_rank_0_dies(settings: dict[str, Any], tmp_path: Path) -> None:
    whole = raylm.train(settings, {"run.dir": str(tmp_path / "whole")})
    sent = _signal_once(tmp_path / "run", 0, signal.SIGKILL)
    raylm.train(settings, {"run.dir": str(tmp_path / "run")})
    assert sent
    np.testing.assert_array_equal(_losses(tmp_path / "run"), _losses(Path(whole.run_dir)))


def test_a_frozen_rank_is_named_and_the_run_goes_on(settings: dict[str, Any], tmp_path: Path) -> None:
    """SIGSTOP: a process that is there and does nothing, as on a node that swaps or a device that hangs."""
    whole = raylm.train(settings, {"run.dir": str(tmp_path / "whole")})
    sent = _signal_once(tmp_path / "run", 1, signal.SIGSTOP)
    raylm.train(settings, {"run.dir": str(tmp_path / "run")})
    assert f"rank 1 (process {sent[0]} on " in (tmp_path / "run" / "stuck.txt").read_text()
    np.testing.assert_array_equal(_losses(tmp_path / "run"), _losses(Path(whole.run_dir)))
    assert not psutil.pid_exists(sent[0]), "nothing stays behind"


def test_without_restarts_the_error_names_the_rank(settings: dict[str, Any], tmp_path: Path) -> None:
    _signal_once(tmp_path / "run", 1, signal.SIGSTOP)
    with pytest.raises(TrainingError, match=r"nothing has moved for 20 s; rank 1 \(process"):
        raylm.train(settings, {"run.dir": str(tmp_path / "run"), "cluster.max_failures": 0})
