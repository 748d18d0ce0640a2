"""What tests of sweeps share: a sweep of a tiny model as a file, and its driver as a process."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.integration.drivers import ROOT, result_of

_SWEEP = ("-m", "raylm.cli", "sweep")


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


def sweep_process(*arguments: str, **options: Any) -> "subprocess.Popen[str]":
    """`raylm sweep` as a process."""
    quiet: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, *_SWEEP, *arguments], cwd=ROOT, env=dict(os.environ), **{**quiet, **options}
    )


def finished(*arguments: str) -> dict[str, Any]:
    """Runs `raylm sweep` to its end and returns what --json says."""
    return result_of(*_SWEEP, *arguments, "--json", timeout_s=560)
