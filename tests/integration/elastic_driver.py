"""An elastic run on a cluster of two nodes, of which one has notice to quit, dies by SIGKILL, and comes back.

A process of its own, because the tests' Ray is another.

    python -m tests.integration.elastic_driver SETTINGS.json
"""

import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raylm.ray_session import LOCAL_ENVIRONMENT


def _steps(run_dir: Path) -> int:
    from raylm.training.metrics import read_metrics

    return max((line["step"] for line in read_metrics(run_dir)), default=0)


def _sizes(run_dir: Path) -> list[int]:
    """The number of workers of each group so far."""
    lines = (run_dir / "events.jsonl").read_text().splitlines() if (run_dir / "events.jsonl").is_file() else []
    return [event["workers"] for event in map(json.loads, lines) if "workers" in event]


def _wait_for(happened: Callable[[], Any]) -> None:
    while not happened():
        time.sleep(0.05)


def _give_notice(address: str, node_id: str) -> None:
    """As a cloud does with a spot instance."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

    deadline_ms = int(time.time() * 1000) + 120_000
    accepted, why_not = GcsClient(address=address).drain_node(
        node_id, DRAIN_NODE_REASON_PREEMPTION, "a test", deadline_ms
    )
    assert accepted, why_not


def main(settings: dict[str, Any]) -> None:
    """Prints the steps, the sizes of the groups, and the checkpoint that the notice led to, as JSON."""
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), **LOCAL_ENVIRONMENT}
    from ray.cluster_utils import Cluster

    import raylm
    from raylm.training.checkpoint import newest_checkpoint

    run_dir = Path(settings["run.dir"])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    nodes = [cluster.add_node(num_cpus=1)]

    def disturb() -> None:
        _wait_for(lambda: _steps(run_dir) >= 5)
        _give_notice(cluster.address, nodes[0].node_id)
        _wait_for(lambda: newest_checkpoint(run_dir / "checkpoints"))
        noticed.append(newest_checkpoint(run_dir / "checkpoints").name)
        cluster.remove_node(nodes[0], allow_graceful=False)
        _wait_for(lambda: _sizes(run_dir)[-1] == 2 and _steps(run_dir) > 50)
        cluster.add_node(num_cpus=1)
        _wait_for(lambda: _sizes(run_dir)[-1] == 3)
        grown_at = _steps(run_dir)
        _wait_for(lambda: _steps(run_dir) > grown_at + 10)
        (run_dir / "stop").touch()

    noticed: list[str] = []
    threading.Thread(target=disturb, daemon=True).start()
    try:
        result = raylm.train(settings, {"cluster.address": cluster.address})
        print(json.dumps({"steps": result.steps, "sizes": _sizes(run_dir), "noticed": noticed}))
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
