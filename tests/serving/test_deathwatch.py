"""What is left of an engine when the process that started it is killed."""

import signal
import subprocess
import sys
import time

import psutil
import pytest

from raylm.serving.deathwatch import deathwatch

# Starts a process that would go on for ever, says its id, and waits.
PARENT = """
import subprocess, sys, time
import psutil
from raylm.serving.deathwatch import deathwatch

child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
with deathwatch() as die_with_us:
    die_with_us([psutil.Process(child.pid)])
    print(child.pid, flush=True)
    time.sleep(600)
"""


def ends(process: psutil.Process, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_who_is_killed_takes_its_processes_along() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        parent.send_signal(signal.SIGKILL)
        assert ends(child)


@pytest.mark.parametrize("same", [True, False])
def test_after_the_block_what_still_runs_is_killed_and_nobody_else(same: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """same: whether the process is still the one that it was when the block began."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as child:
        process = psutil.Process(child.pid)
        if not same:
            monkeypatch.setattr("raylm.serving.deathwatch._began", lambda _pid: "12")
        with deathwatch() as die_with_us:
            die_with_us([process])
            assert process.is_running()
        assert ends(process, 20 if same else 0.5) is same
        child.kill()


def test_one_that_has_ended_is_passed_over() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        process = psutil.Process(child.pid)
    with deathwatch() as die_with_us:
        die_with_us([process])
