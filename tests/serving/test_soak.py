"""Minutes of load of all kinds: nothing fails, and no process keeps memory of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serve_soak.py"
MINUTES = 4
ALLOWED_MIB = 25
"""For a kind of process in the half of the time that is compared; Python's own memory moves by a few."""


@pytest.mark.slow
def test_memory_stays_flat_under_load() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--minutes", str(MINUTES)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    requests, growth = result["requests"], result["growth_mib"]
    assert requests["failed"] == 0, requests
    assert min(requests[kind] for kind in ("answered", "streamed", "dropped", "refused")) > 20, requests
    assert {"replica", "engine"} <= growth.keys()
    assert max(growth.values()) < ALLOWED_MIB, growth
