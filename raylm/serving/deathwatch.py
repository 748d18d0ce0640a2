"""An engine's processes do not outlive the process that started them, however that ends.

vLLM's engine core waits for requests for ever when its client was killed, and keeps its memory. A small process of its
own notices the end of the one that made it by the end of a pipe, and kills what it was told of.
"""

import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

_WATCH = """
import os, sys
for told in sys.stdin.read().split():
    pid, _, began = told.partition(":")
    try:
        with open(f"/proc/{pid}/stat") as stat:
            if stat.read().rpartition(")")[2].split()[19] == began:
                os.kill(int(pid), 9)
    except OSError:
        pass
"""


@contextmanager
def deathwatch() -> Iterator[Callable[[Iterable[psutil.Process]], None]]:
    """Gives a function that takes processes: they are killed when this process ends within the block, or after the
    block where they still run. On Linux; elsewhere nothing is killed."""
    # A session of its own: ctrl-c, or whatever ends a process group, must not end the watch first.
    command = [sys.executable, "-I", "-S", "-c", _WATCH]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    ) as watch:  # leaving it closes the pipe and waits
        pipe = watch.stdin
        assert pipe is not None

        def tell(processes: Iterable[psutil.Process]) -> None:
            for process in processes:
                if began := _began(process.pid):
                    print(f"{process.pid}:{began}", file=pipe, flush=True)

        yield tell


def _began(pid: int) -> str:
    """When a process began, in ticks since the machine did, so that another one of the same id is told apart."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
