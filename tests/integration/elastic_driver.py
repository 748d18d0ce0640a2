"""An elastic run on a cluster of two nodes, of which one has notice to quit, dies by SIGKILL, and comes back.

A process of its own, because the tests' Ray is another.

    python -m tests.integration.elastic_driver SETTINGS.json
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


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


@contextlib.contextmanager
def _held_up(run_dir: Path) -> Iterator[None]:
    """The workers of the group do not run within: a node starts within seconds then, also on two cores."""
    ranks = [
        json.loads((run_dir / "ranks" / f"{rank:05}.json").read_text())["pid"] for rank in range(_sizes(run_dir)[-1])
    ]
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in ranks:
            os.kill(pid, signal.SIGCONT)


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
    # Not LOCAL_ENVIRONMENT: workers run at nice 15, so that a node can start beside them on two cores.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    import ray

    import raylm
    from raylm.training.checkpoint import newest_checkpoint

    run_dir = Path(settings["run.dir"])
    head = ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    nodes = [_start_node(head.address_info["gcs_address"])]
    other = next(node["NodeID"] for node in ray.nodes() if node["NodeID"] != ray.get_runtime_context().get_node_id())
    noticed: list[str] = []

    def disturb() -> None:
        _wait_for(lambda: _steps(run_dir) >= 5)
        _give_notice(head.address_info["gcs_address"], other)
        _wait_for(lambda: newest_checkpoint(run_dir / "checkpoints"))
        noticed.append(newest_checkpoint(run_dir / "checkpoints").name)
        os.killpg(nodes[0].pid, signal.SIGKILL)
        _wait_for(lambda: _sizes(run_dir)[-1] == 2 and _steps(run_dir) > 50)
        with _held_up(run_dir):
            nodes.append(_start_node(head.address_info["gcs_address"]))
        _wait_for(lambda: _sizes(run_dir)[-1] == 3)
        grown_at = _steps(run_dir)
        _wait_for(lambda: _steps(run_dir) > grown_at + 10)

    def disturb_and_stop() -> None:
        try:
            disturb()
        finally:
            (run_dir / "stop").touch()

    threading.Thread(target=disturb_and_stop, daemon=True).start()
    try:
        result = raylm.train(settings)
        print(json.dumps({"steps": result.steps, "sizes": _sizes(run_dir), "noticed": noticed}))
    finally:
        ray.shutdown()
        for node in nodes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()


def _start_node(address: str) -> subprocess.Popen[bytes]:
    """A node of one CPU that has joined, in a process group of its own. Ray gives up on one that a busy machine starts
    slowly."""
    import ray

    command = [str(Path(sys.executable).parent / "ray"), "start", f"--address={address}", "--num-cpus=1", "--block"]
    before = ray.cluster_resources()["CPU"]
    while True:
        node = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        _wait_for(lambda: ray.cluster_resources()["CPU"] > before or node.poll() is not None)  # noqa: B023
        if node.poll() is None:
            return node


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
