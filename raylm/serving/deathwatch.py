"""An engine's processes do not outlive the process that started them, however that ends.

vLLM's engine core waits for requests for ever when its client was killed, and keeps its memory. A small process of its
own notices the end of the one that made it by the end of a pipe, and kills what it was told of.
"""

import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

_WATCH = """
import os, sys
sys.stdin.buffer.read()
for told in sys.argv[1:]:
    pid, _, began = told.partition(":")
    try:
        with open(f"/proc/{pid}/stat") as stat:
            if stat.read().rpartition(")")[2].split()[19] == began:
                os.kill(int(pid), 9)
    except OSError:
        pass
"""


@contextmanager
def dying_together(processes: Iterable[psutil.Process]) -> Iterator[None]:
    """Around the life of these processes: they are killed when this process ends within the block, or after the block
    where they still run. On Linux only; elsewhere nothing is done."""
    told = [f"{process.pid}:{began}" for process in processes if (began := _began(process.pid))]
    if not told:
        yield
        return
    # A session of its own: ctrl-c, or whatever ends a process group, must not end the watch first.
    command = [sys.executable, "-I", "-S", "-c", _WATCH, *told]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True):
        yield  # leaving Popen's block closes the pipe and waits


def _began(pid: int) -> str:
    """When a process began, in ticks since the machine did, so that another one of the same id is told apart."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
