import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from raylm.training.pulse import EXIT_CODE, Mark, Pulse, diagnosis, read_marks

ROOT = Path(__file__).parents[2]


def _mark(rank: int, progress: int, doing: str, age_s: float = 0.0) -> Mark:
    return Mark(rank, progress, doing, time.time() - age_s, "host", 100 + rank)


def test_the_rank_that_is_behind_is_named() -> None:
    marks = [_mark(0, 9, "computes"), _mark(1, 7, "waits for the data of step 3"), _mark(2, 9, "computes")]
    assert diagnosis([*marks], 60) == (
        "nothing has moved for 60 s; rank 1 (process 101 on host) is stuck: it waits for the data of step 3. "
        "The others wait: computes"
    )


def test_a_process_that_does_not_run_is_named_however_far_it_is() -> None:
    found = diagnosis([_mark(0, 3, "computes"), _mark(1, 4, "computes", 50.4), None], 60)
    assert "rank 1 (process 101 on host) is stuck: it computes; its process has not run for 50 s" in found
    assert "rank 2 gave no sign of life at all" in found
    assert "rank 0 (" not in found


def test_a_rank_that_moves_is_left_alone_and_one_that_does_not_gives_up(tmp_path: Path) -> None:
    gave_up = threading.Event()
    found: list[str] = []

    def give_up(what: str) -> None:
        found.append(what)
        gave_up.set()

    pulse = Pulse(tmp_path, rank=0, world_size=2, timeout_s=1.0, give_up=give_up)
    for _ in range(8):
        pulse.beat("computes")
        time.sleep(0.25)
    assert not found
    pulse.beat("takes step 9")
    assert gave_up.wait(20)
    pulse.close()
    assert "rank 0" in found[0]
    assert "it takes step 9" in found[0]
    assert "rank 1 gave no sign of life at all" in found[0]
    mark = read_marks(tmp_path, 1)[0]
    assert mark is not None
    assert (mark.pid, mark.progress) == (os.getpid(), 9)


STUCK = """
import os, sys
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from raylm.training.pulse import EXIT_CODE, Pulse

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)

def give_up(found):
    print(found, flush=True)
    os._exit(EXIT_CODE)

pulse = Pulse(folder / "ranks", rank=rank, world_size=2, timeout_s=4.0, give_up=give_up)
for step in range(10_000):
    pulse.beat(f"takes step {step}")
    dist.all_reduce(torch.ones(1))
    if step == 5:
        print("going", flush=True)
"""


def test_a_frozen_process_is_found_by_the_one_that_waits_for_it(tmp_path: Path) -> None:
    """A real collective that never ends: rank 1 is stopped, rank 0 hangs in it, names rank 1 and leaves."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", STUCK, str(tmp_path), str(rank)], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        for rank in range(2)
    ]
    try:
        for process in ranks:
            assert process.stdout is not None
            assert process.stdout.readline() == "going\n"
        ranks[1].send_signal(signal.SIGSTOP)
        output, _ = ranks[0].communicate(timeout=60)
        assert ranks[0].returncode == EXIT_CODE
        assert f"rank 1 (process {ranks[1].pid} on " in output
        assert "rank 0 (" not in output
    finally:
        for process in ranks:
            process.kill()
            process.wait()
