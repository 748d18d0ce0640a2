"""The number of workers changes while a run goes on, because nodes come and go."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import raylm
from raylm.training.metrics import read_metrics
from tests.conftest import PAIRS
from tests.integration.drivers import result_of


def _losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["train/loss"]) for line in read_metrics(run_dir) if "train/loss" in line]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_node_that_goes_shrinks_the_group_and_one_that_comes_lets_it_grow(
    ray_cluster: Any, tiny_model_dir: Path, write_dataset: Any, tmp_path: Path
) -> None:
    """Four micro-batches a step on three, two and three workers: the curve is that of one worker. Notice to quit leads
    to a checkpoint before the first one that is due, and the run ends ten steps after it has grown."""
    settings = {
        "model.path": str(tiny_model_dir),
        "data.train": str(write_dataset(PAIRS)),
        "data.max_seq_len": 64,
        "training": {"num_epochs": 2000, "max_steps": 9000, "global_batch_size": 4, "precision": "fp32"},
        "optimizer.learning_rate": 1e-5,  # hundreds of steps: learnt by heart, losses would amplify rounding
        "schedule.name": "constant",
        "checkpoint.interval_steps": 50,
        "metrics.sinks": [],
        "export.enabled": False,
    }
    elastic = {
        **settings,
        "run.dir": str(tmp_path / "elastic"),
        "cluster": {"num_workers": [1, 3], "cpus_per_worker": 1, "resize_interval_s": 3},
    }
    (tmp_path / "settings.json").write_text(json.dumps(elastic))
    found = result_of("-m", "tests.integration.elastic_driver", str(tmp_path / "settings.json"), timeout_s=800)
    assert int(found["noticed"][0].removeprefix("step-")) < 50
    assert [found["sizes"][0], *sorted({*found["sizes"]}), found["sizes"][-1]] == [3, 2, 3, 3]
    got = _losses(tmp_path / "elastic")
    assert [step for step, _ in got] == list(range(1, found["steps"] + 1))
    whole = {"run.dir": str(tmp_path / "whole"), "cluster.cpus_per_worker": 1, "training.max_steps": found["steps"]}
    expected = _losses(Path(raylm.train(settings, whole).run_dir))
    np.testing.assert_allclose([loss for _, loss in got], [loss for _, loss in expected], rtol=1e-4)
