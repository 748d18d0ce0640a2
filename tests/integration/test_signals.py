"""SIGTERM before a training or a sweep has begun ends it in one line. Run by `make test-slow`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.conftest import PAIRS, command_line
from tests.integration.sweep_support import ROOT, write_sweep

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def commands(tiny_model_dir: Path, write_dataset: Any, tmp_path: Path) -> dict[str, list[str]]:
    sweep = write_sweep(tmp_path, tiny_model_dir, write_dataset(PAIRS), write_dataset(PAIRS[:6], "e.json"))
    base = yaml.safe_load(sweep.read_text())["base"]
    training = tmp_path / "train.yaml"
    training.write_text(yaml.safe_dump({**base, "run": {"dir": str(tmp_path / "run")}}))
    return {"sweep": ["sweep", str(sweep), "budget.trials=2"], "train": ["train", str(training)]}


def _has_raylet(process: psutil.Process) -> bool:
    return any("raylet" in command_line(child) for child in process.children(recursive=True))


@pytest.mark.parametrize(("command", "later"), [("sweep", 0.0), ("sweep", 0.7), ("sweep", 2.0), ("train", 0.7)])
def test_sigterm_while_ray_starts_is_one_line(commands: dict[str, list[str]], command: str, later: float) -> None:
    """Ray's core takes the signal over while it connects, a moment after its raylet is there."""
    driver = subprocess.Popen(
        [sys.executable, "-m", "raylm.cli", *commands[command]],
        cwd=ROOT,
        env=dict(os.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    process = psutil.Process(driver.pid)
    deadline = time.monotonic() + 120
    while not _has_raylet(process):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(later)
    children = process.children(recursive=True)
    driver.send_signal(signal.SIGTERM)
    said, _ = driver.communicate(timeout=120)
    assert driver.returncode == 128 + signal.SIGTERM, said
    assert said.splitlines()[-1] == "terminated"
    assert "***" not in said
    assert "Traceback" not in said
    _, alive = psutil.wait_procs(children, timeout=180)  # Ray's agents look for their raylet once they have started
    assert not alive
