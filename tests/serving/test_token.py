"""A cluster that asks for a token, and commands without it."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.servers import free_port

TOKEN = "t0ken-" * 6


def environment(home: Path) -> dict[str, str]:
    """Nothing of this process's Ray in it, and no token file."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # One attempt instead of 20, one a second.
    return kept | {"HOME": str(home), "RAY_gcs_server_port_wait_time_s": "2", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="rl") as ray_dir:
        options = [f"--port={port}", "--num-cpus=1", "--include-dashboard=false", "--temp-dir", ray_dir]
        variables = {**environment(tmp_path_factory.mktemp("home")), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
        del variables["RAY_gcs_server_port_wait_time_s"]
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables) as head:
            assert head.stdout is not None
            assert any("--block" in line for line in head.stdout)
            yield f"127.0.0.1:{port}"
            head.send_signal(signal.SIGINT)
            head.communicate(timeout=60)


@pytest.mark.parametrize(
    "variables", [{}, {"RAY_AUTH_MODE": "token"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "an0ther"}]
)
def test_what_to_set_is_said(address: str, variables: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "raylm.cli", "deploy", "--status", f"cluster_address={address}"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**environment(tmp_path), **variables}
    )
    assert done.returncode == 2, done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.startswith(f"error: Ray cluster {address}: asks for a token")
    assert "RAY_AUTH_MODE=token" in said
    assert "RAY_AUTH_TOKEN" in said
