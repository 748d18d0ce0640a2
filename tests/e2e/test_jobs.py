"""Jobs on a cluster, a killed driver, and the quickstart: what takes minutes. Run by `make test-slow`."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raylm.training.metrics import read_metrics
from tests.conftest import PAIRS

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PORT = 46379
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def _losses(run_dir: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run_dir) if "train/loss" in line]


@pytest.fixture
def cluster() -> Iterator[dict[str, str]]:
    """A head node of its own, started with `ray start` as a user would."""
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    start = [str(BIN / "ray"), "start", "--head", f"--port={PORT}", "--dashboard-port=48265", "--num-cpus=2", "--block"]
    start += ["--dashboard-agent-listen-port=48266"]  # another Ray of this machine may have the usual one
    # Not `ray stop` at the end: it would stop every Ray on the machine.
    head = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    yield {**environment, "RAY_ADDRESS": "http://127.0.0.1:48265"}
    head.terminate()
    head.wait(timeout=60)


def _submit(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """`ray job submit`; a head node that has just started needs a moment until it takes jobs."""
    command = [str(BIN / "ray"), "job", "submit", "--working-dir", ".", "--", sys.executable, "-m", "jobs.train"]
    for _ in range(10):
        done = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, timeout=900, cwd=ROOT, env=environment
        )
        output = done.stdout + done.stderr
        if not any(reason in output for reason in ("No available agent", "Failed to connect", "ConnectionError")):
            break
        time.sleep(10)
    return done


def test_a_submitted_job_succeeds_with_the_same_artefacts(
    cluster: dict[str, str], tiny_model_dir: Path, write_dataset: Any, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    options = [f"model.path={tiny_model_dir}", f"data.train={write_dataset(PAIRS)}", "data.max_seq_len=64"]
    done = _submit(["examples/tiny.yaml", f"run.dir={run_dir}", *options], cluster)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "succeeded" in (done.stdout + done.stderr).lower()
    assert len(_losses(run_dir)) == 4
    assert (run_dir / "export" / "model.safetensors").is_file()
    relative = _submit(["examples/tiny.yaml", "run.dir=relative", *options], cluster)
    assert "is relative, and a Ray job runs in a temporary folder" in relative.stdout + relative.stderr
    assert relative.returncode != 0


def test_a_killed_driver_resumes_bit_for_bit(tiny_model_dir: Path, write_dataset: Any, tmp_path: Path) -> None:
    options = [
        f"model.path={tiny_model_dir}",
        f"data.train={write_dataset(PAIRS)}",
        "data.max_seq_len=64",
        "training.method=full",
        "lora=null",
        "training.max_steps=60",
        "training.num_epochs=20",
        "checkpoint.interval_steps=5",
        "optimizer.learning_rate=0.01",
    ]

    def command(run_dir: Path, *extra: str) -> list[str]:
        return [
            sys.executable,
            "-m",
            "raylm.cli",
            "train",
            "examples/tiny.yaml",
            f"run.dir={run_dir}",
            *options,
            *extra,
        ]

    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True, timeout=600, cwd=ROOT)
    killed = tmp_path / "killed"
    driver = subprocess.Popen(command(killed), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 500
    while len(_losses(killed)) < 17 and time.monotonic() < deadline:
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert 17 <= len(_losses(killed)) < 60
    resumed = subprocess.run(
        command(killed, "training.resume=auto", "--json"), check=True, capture_output=True, timeout=600, cwd=ROOT
    )
    assert json.loads(resumed.stdout.splitlines()[-1])["steps"] == 60
    assert _losses(killed) == _losses(tmp_path / "whole")
