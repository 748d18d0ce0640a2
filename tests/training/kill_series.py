"""Kills a run at random moments until it has been killed often enough, then lets it end.

    python -m tests.training.kill_series MODEL RUN_DIR KILLS SEED [MIRROR]

Each attempt is a fork of this process, which has imported everything: an attempt takes a second, and most kills fall
into steps, saves and copies. After each kill every checkpoint that counts is held against its digests. Prints, as JSON,
at how many steps each attempt was killed and how many unfinished folders the kills left.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from raylm.training.checkpoint import newest_checkpoint, read_meta, verify_checkpoints
from raylm.training.metrics import read_metrics
from raylm.training.mirror import fetch, newest_in_mirror
from tests.training.support import Rows, make_config, run_in_process

STEPS = 60


def main(model: str, run_dir: str, kills: int, seed: int, mirror: str | None = None) -> None:
    """See above."""
    torch.set_num_threads(1)
    run, moments = Path(run_dir), random.Random(seed)
    settings = ["checkpoint.interval_steps=1", f"training.max_steps={STEPS}", "training.num_epochs=40"]
    if mirror:
        settings.append(f"checkpoint.mirror={mirror}")
    config = make_config(Path(model), run, *settings)
    with tempfile.TemporaryDirectory() as folder:  # imports what is imported on use
        run_in_process(make_config(Path(model), Path(folder), "training.max_steps=1"), Rows())
    killed_at, unfinished = [], 0
    while True:
        newest = newest_checkpoint(run / "checkpoints")
        start = read_meta(newest).step if newest else 0
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            try:
                run_in_process(config, Rows(), start_from=newest, start=start)
            finally:
                os._exit(0 if newest_checkpoint(run / "checkpoints") else 1)
        if len(killed_at) == kills:
            assert os.waitpid(child, 0)[1] == 0
            break
        goal = start + moments.randint(0, 3)
        while max((line["step"] for line in read_metrics(run)), default=0) <= goal:
            time.sleep(0.002)
            if os.waitpid(child, os.WNOHANG)[0]:
                raise SystemExit("the run ended before it was killed often enough")
        time.sleep(moments.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed_at.append(max(line["step"] for line in read_metrics(run)))
        unfinished += len(list((run / "checkpoints").glob(".step-*")))
        _check(run, mirror)
    print(json.dumps({"killed_at": killed_at, "unfinished": unfinished}))


def _check(run: Path, mirror: str | None) -> None:
    if (run / "checkpoints").is_dir():
        problems = [report.problem for report in verify_checkpoints(run / "checkpoints") if report.problem]
        assert not problems, problems
    address = newest_in_mirror(mirror) if mirror else None
    if address:
        with tempfile.TemporaryDirectory() as folder:
            fetch(address, Path(folder))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])
