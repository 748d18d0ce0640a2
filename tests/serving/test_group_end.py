"""SIGTERM that reaches a server's Ray as well, as a shell or systemd sends it; a small application in vLLM's place."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from tests.serving.servers import free_port

PROGRAM = """
import sys
from ray import serve
from raylm.config import ServeConfig, load_config
from raylm.ray_session import ray_session
from raylm.serving.endpoint import _deployed, _terminated_like_interrupted, Endpoint, is_ready
from raylm.serving.processes import no_process_left
from raylm.serving.proxy import front_door

@serve.deployment(ray_actor_options={"num_cpus": 0})
class Idle:
    def __call__(self, request):
        return "well"

config = load_config(ServeConfig, {"model": "m", "port": int(sys.argv[1]), "proxy": "haproxy"})
with no_process_left() as descendants, ray_session(None, num_cpus=2) as ray:
    address = ray.get_runtime_context().gcs_address
    with _terminated_like_interrupted(descendants, address), front_door(config, num_nodes=1) as door:
        descendants.note_folder(door.scratch)
        with _deployed(Idle.bind()), descendants.noted():
            endpoint = Endpoint(f"http://127.0.0.1:{config.port}", "m", door.proxy)
            while not is_ready(endpoint.url):
                pass
            print(door.scratch, flush=True)
            endpoint.wait()
"""


@pytest.mark.parametrize("whole", ["group", pytest.param("unit", marks=pytest.mark.slow)])
def test_a_server_whose_ray_is_terminated_too_ends_soon_and_leaves_nothing(whole: str, tmp_path: Path) -> None:
    """group: its process group, without Ray's workers; unit: every process, as systemd's KillMode=control-group."""
    with tempfile.TemporaryDirectory(prefix="rl") as ray_dir, (tmp_path / "log").open("w") as log:
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"RAY_TMPDIR": ray_dir}
        command = [sys.executable, "-c", PROGRAM, str(free_port())]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, start_new_session=True
        ) as server:
            assert server.stdout is not None
            scratch = server.stdout.readline().strip()
            assert scratch, (tmp_path / "log").read_text()
            processes = psutil.Process(server.pid).children(recursive=True)
            assert any("haproxy" in process.name() for process in processes)
            if whole == "group":
                os.killpg(server.pid, signal.SIGTERM)
            else:
                for process in (psutil.Process(server.pid), *processes):
                    process.terminate()
            began = time.monotonic()
            assert server.wait(timeout=30) == 128 + signal.SIGTERM, (tmp_path / "log").read_text()
        assert time.monotonic() - began < 15
        left = [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
        assert left == []
        assert not [process for process in psutil.process_iter(["cmdline"]) if scratch in str(process.info["cmdline"])]
        assert not Path(scratch).exists()
