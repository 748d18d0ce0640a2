"""An elastic run on a cluster of two nodes, of which one dies by SIGKILL and comes back: a process of its own, because
the tests' Ray is another.

    python -m tests.integration.elastic_driver SETTINGS.json
"""

import json
import os
import secrets
import sys
import threading
import time
from pathlib import Path
from typing import Any


def _steps(run_dir: Path) -> int:
    from raylm.training.metrics import read_metrics

    return max((line["step"] for line in read_metrics(run_dir)), default=0)


def _sizes(run_dir: Path) -> list[int]:
    """The number of workers of each group so far."""
    lines = (run_dir / "events.jsonl").read_text().splitlines() if (run_dir / "events.jsonl").is_file() else []
    return [event["workers"] for event in map(json.loads, lines) if "workers" in event]


def main(settings: dict[str, Any]) -> None:
    """Prints the result and the sizes of the groups as JSON."""
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    from ray.cluster_utils import Cluster

    import raylm

    run_dir = Path(settings["run.dir"])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    nodes = [cluster.add_node(num_cpus=1)]

    def disturb() -> None:
        while _steps(run_dir) < 5:
            time.sleep(0.1)
        cluster.remove_node(nodes[0], allow_graceful=False)
        while _sizes(run_dir)[-1] == 3:
            time.sleep(0.1)
        cluster.add_node(num_cpus=1)

    threading.Thread(target=disturb, daemon=True).start()
    try:
        result = raylm.train(settings, {"cluster.address": cluster.address})
        print(json.dumps({"steps": result.steps, "sizes": _sizes(run_dir)}))
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
