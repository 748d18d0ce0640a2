"""A dataset larger than Ray's object store, streamed without the cache: tokens are spilled to disk, the run goes on."""

import json
from pathlib import Path

import pytest

from raylm.training.metrics import read_metrics
from tests.integration.drivers import result_of

STORE_BYTES = 80 * 2**20
DRIVER = f"""
import json, sys
import ray
import raylm
from raylm.ray_session import LOCAL_ENVIRONMENT
import os
os.environ.update(LOCAL_ENVIRONMENT)
ray.init(address="local", num_cpus=4, object_store_memory={STORE_BYTES}, include_dashboard=False, log_to_driver=False)
result = raylm.train(json.load(open(sys.argv[1])))
print(json.dumps({{"steps": result.steps, "tokens": result.data["tokens"]}}))
ray.shutdown()
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_tokens_that_do_not_fit_the_object_store_are_spilled(tiny_model_dir: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    with data.open("w") as file:
        for number in range(110_000):
            row = {"prompt": f"question {number}", "completion": "yes " * 104 + "hello world " * 25}
            file.write(json.dumps(row) + "\n")
    settings = {
        "model.path": str(tiny_model_dir),
        "data": {"train": str(data), "max_seq_len": 256, "cache": False},
        "run.dir": str(tmp_path / "run"),
        "training": {"max_steps": 20, "global_batch_size": 4, "precision": "fp32"},
        "metrics.sinks": [],
        "export.enabled": False,
        "cluster.cpus_per_worker": 1,
    }
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    found = result_of("-c", DRIVER, str(tmp_path / "settings.json"), timeout_s=800)
    assert found["tokens"] * 4 > STORE_BYTES, "ids alone are more than the store holds"
    assert found["steps"] == 20
    assert len([line for line in read_metrics(tmp_path / "run") if "train/loss" in line]) == 20
