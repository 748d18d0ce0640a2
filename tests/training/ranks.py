"""Several ranks on one machine without Ray: processes that live for a module of tests, so each imports torch once."""

import multiprocessing
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from raylm.config import TrainConfig
from tests.training.support import Rows, make_plan

TIMEOUT_S = 240


class Ranks:
    """A pool of processes; each call runs one function on the first n of them, as ranks of one process group."""

    def __init__(self, number: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Any] = []
        self._processes: list[Any] = []
        for _ in range(number):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(rank, world_size, *arguments)` returns on each rank. Raises what the first rank raised."""
        with tempfile.TemporaryDirectory() as folder:
            for rank, pipe in enumerate(self._pipes[:world_size]):
                pipe.send((f"{folder}/store", rank, world_size, function, arguments))
            results = []
            for rank, pipe in enumerate(self._pipes[:world_size]):
                assert pipe.poll(TIMEOUT_S), f"rank {rank} does not answer"
                results.append(pipe.recv())
        for _, error, trace in results:
            if error is not None:
                print(trace)
                raise error
        return [result for result, _, _ in results]

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()
            process.join()


@contextmanager
def ranks(number: int) -> Iterator[Ranks]:
    """A pool for the length of a block."""
    pool = Ranks(number)
    try:
        yield pool
    finally:
        pool.close()


def _serve(pipe: Any) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        store, rank, world_size, function, arguments = pipe.recv()
        dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
        try:
            pipe.send((function(rank, world_size, *arguments), None, ""))
        except Exception as error:  # sent to the test, which raises it
            pipe.send((None, error, traceback.format_exc()))
        finally:
            dist.destroy_process_group()
            _forget_deepspeed()


def _forget_deepspeed() -> None:
    """DeepSpeed keeps the process groups it first saw, and counts modules and parameters, for the life of a process;
    the next run may join processes that have seen other runs."""
    if "deepspeed.runtime.zero.parameter_offload" in sys.modules:
        from deepspeed.comm import comm
        from deepspeed.runtime.zero import Init
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
        from deepspeed.utils import groups

        comm.cdb = None
        groups._WORLD_GROUP = None
        Init.param_id = 0
        DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0


def train_rank(
    rank: int, world_size: int, config: TrainConfig, rows: Rows, start: int = 0, start_from: Path | None = None
) -> list[dict[str, Any]]:
    """A worker of a run over `rows`; returns the lines of metrics.jsonl. Evaluates on `rows` where data.eval is set."""
    from raylm.training.metrics import read_metrics
    from raylm.training.run_dir import RunDir
    from raylm.training.worker import WorkerData, WorkerJob, run_worker

    plan = make_plan(config, rows)
    micro = config.training.micro_batch_size
    run = RunDir(Path(config.run.dir))
    run.path.mkdir(parents=True, exist_ok=True)
    steps = tuple(plan.steps_in_epoch(epoch) for epoch in range(len(plan.epochs)))
    job = WorkerJob(config, run, plan.num_steps, steps, {"setting": 1}, start_from)
    evaluation = None
    if config.data.eval:
        evaluation = lambda: list(rows.stream(plan, micro, rank=rank, world=world_size))[: 3 - rank]  # noqa: E731
    data = WorkerData(lambda: rows.stream(plan, micro, start=start, rank=rank, world=world_size), evaluation)
    run_worker(job, data, torch.device("cpu"), rank=rank, world_size=world_size)
    return list(read_metrics(run.path))
