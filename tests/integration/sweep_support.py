"""What tests and benchmarks of sweeps share: a sweep of a tiny model as a file, and its driver as a process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]


def write_sweep(folder: Path, model: Path, data: Path, evaluation: Path, **settings: Any) -> Path:
    """A sweep over the learning rate of 12 steps with a report every three, as a YAML file."""
    tree: dict[str, Any] = {
        "base": {
            "model": {"path": str(model)},
            "data": {"train": str(data), "eval": str(evaluation), "max_seq_len": 64},
            "training": {
                "global_batch_size": 4,
                "num_epochs": 9,
                "max_steps": 12,
                "eval_interval_steps": 3,
                "precision": "fp32",
            },
            "schedule": {"name": "constant"},
        },
        "dir": str(folder / "sweep"),
        "space": {"optimizer.learning_rate": {"loguniform": [1e-5, 3e-2]}},
        "concurrency": 2,
        "export_best": False,
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({**tree, **settings}))
    return path


def command(*arguments: str) -> list[str]:
    """`raylm sweep` as a process."""
    return [sys.executable, "-m", "raylm.cli", "sweep", *arguments]


def sweep_process(*arguments: str, **options: Any) -> "subprocess.Popen[str]":
    """Starts it."""
    quiet: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command(*arguments), cwd=ROOT, env=dict(os.environ), **{**quiet, **options})


def finished(*arguments: str) -> dict[str, Any]:
    """Runs it to its end and returns what --json says."""
    done = subprocess.run(command(*arguments, "--json"), cwd=ROOT, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))
