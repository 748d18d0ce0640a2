"""C03, C04: SIGKILL at random moments of real runs, most of them while something is written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from raylm.training.checkpoint import newest_checkpoint
from raylm.training.metrics import read_metrics
from tests.training.kill_series import STEPS
from tests.training.support import Rows, make_config, read_checkpoint, run_in_process

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("kills", "mirrored"), [(4, False), pytest.param(20, False, marks=pytest.mark.slow), (4, True)]
)
def test_killed_runs_end_bit_for_bit_like_one_that_was_not(
    tiny_model_dir: Path, tmp_path: Path, kills: int, mirrored: bool
) -> None:
    command = [sys.executable, "-m", "tests.training.kill_series", str(tiny_model_dir), str(tmp_path / "killed")]
    command += [str(kills), "7", *([str(tmp_path / "mirror")] if mirrored else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["killed_at"]) == kills
    whole = make_config(tiny_model_dir, tmp_path / "whole", f"training.max_steps={STEPS}", "training.num_epochs=40")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run_in_process(whole, Rows())
    finally:
        torch.set_num_threads(threads)
    curves = [
        [(line["step"], line["train/loss"]) for line in read_metrics(tmp_path / name)] for name in ("killed", "whole")
    ]
    assert curves[0] == curves[1]
    states = []
    for name in ("killed", "whole"):
        newest = newest_checkpoint(tmp_path / name / "checkpoints")
        assert newest is not None
        states.append(read_checkpoint(newest))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
