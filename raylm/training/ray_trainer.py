"""The glue that runs worker.py inside ray.train.torch.TorchTrainer. The only file of this room that knows Ray Train."""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raylm import errors
from raylm.config import TrainConfig
from raylm.data.stream import MicroBatch, in_order, micro_batches, ordered_stream, split_in_turn, to_micro_batch
from raylm.errors import ClusterError, RaylmError, TrainingError
from raylm.ray_session import in_own_ray
from raylm.training.checkpoint import newest_checkpoint, read_meta
from raylm.training.job import WorkerData, WorkerJob, write_failure
from raylm.training.run_dir import CONFIG_FILE, RunDir
from raylm.words import counted


@dataclass(frozen=True, slots=True)
class Resources:
    """What each worker gets. num_workers: as Ray Train takes it, with the fewest and the most for an elastic run."""

    num_workers: int | tuple[int, int]
    cpus_per_worker: int
    use_gpu: bool
    gpus_per_worker: float = 1.0
    """Of each where use_gpu is set; parts of one are for runs beside each other."""
    threads: int | None = None
    """Of each worker on a CPU; default: the machine's cores divided by its workers."""


@dataclass(frozen=True, slots=True)
class TrainData:
    """Object references of the token store, the plan and the evaluation blocks."""

    store: Any
    plan: Any
    evaluation: list[Any]


def plan_resources(config: TrainConfig, cluster: dict[str, float]) -> Resources:
    """Workers and their CPUs and GPUs on a cluster of the given resources; one CPU is left for the data.

    Raises ClusterError when the cluster is too small for the fewest workers.
    """
    section = config.cluster
    fewest, most = section.min_workers, section.max_workers
    cpus, gpus = int(cluster.get("CPU", 0)), int(cluster.get("GPU", 0))
    use_gpu = gpus >= fewest if section.use_gpu == "auto" else section.use_gpu
    if use_gpu and gpus < fewest:
        raise ClusterError(
            "cluster.num_workers",
            f"{counted(fewest, 'worker')} with a GPU each: {counted(fewest, 'GPU')} needed, the cluster has {gpus}.",
            "Ask for fewer workers, or set cluster.use_gpu=false.",
        )
    share = 1 if use_gpu else max(1, (cpus - 1) // most)
    per_worker = section.cpus_per_worker or share
    needed = fewest * per_worker + 1
    if needed > cpus:
        raise ClusterError(
            "cluster.num_workers",
            f"{counted(fewest, 'worker')} of {counted(per_worker, 'CPU')} and one CPU for the data need {needed} CPUs, "
            f"the cluster has {cpus}.",
            "Ask for fewer workers or CPUs, or start a larger cluster.",
        )
    return Resources((fewest, most) if section.is_elastic else most, per_worker, use_gpu)


def fit(job: WorkerJob, data: TrainData, resources: Resources) -> None:
    """Runs the job on Ray Train to its end; a lost worker restarts it from the newest complete checkpoint.

    Raises the RaylmError a worker stopped for, or TrainingError.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    config, stream = job.config, _StreamFactory(job, data)
    # A worker that has the stream to itself runs it too: Ray Train would start two processes to share it out.
    shares_stream = resources.num_workers != 1
    trainer = _trainer_class(job.run.placement_group, shares_stream=shares_stream)(
        _train_function,
        train_loop_config={
            "job": job,
            "stream": None if shares_stream else stream,
            "evaluation": data.evaluation,
            "threads": resources.threads,
        },
        scaling_config=ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=resources.use_gpu,
            resources_per_worker={
                "CPU": resources.cpus_per_worker,
                **({"GPU": resources.gpus_per_worker} if resources.use_gpu else {}),
            },
            elastic_resize_monitor_interval_s=config.cluster.resize_interval_s,
        ),
        torch_config=TorchConfig(backend=_backend(config, resources)),
        datasets={"train": stream} if shares_stream else {},
        dataset_config=_data_config(),
        run_config=RunConfig(
            name=f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
            storage_path=str(job.run.ray),
            # Threads that wait give their core away: spinning ones slow a shared machine down many times over.
            # Packed rows differ in length: without expandable segments a GPU's memory goes to pieces.
            worker_runtime_env={
                "env_vars": {"OMP_WAIT_POLICY": "PASSIVE", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
            },
            failure_config=FailureConfig(max_failures=config.cluster.max_failures),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        _raise_failure(job.run)
        raise _as_training_error(error, job.run) from error
    _raise_failure(job.run)


def _trainer_class(note: Path, *, shares_stream: bool) -> Any:
    """Ray Train's trainer, without what it would start in vain.

    Where the workers share no stream: the actor that would give them their parts. In a Ray of our own: the watchman
    that cannot see. He is a detached actor that asks Ray's state API whether the controller lives, to remove its
    placement group if not. The Ray that ray_session.py starts has no such API: the question takes 40 s to fail, and a
    run waits up to 12 s for it at its end (Ray 2.60, placement_group_callback.py). The group goes with that Ray; who
    runs several trainings on it, and outlives their processes, calls `free_group`. note: where the group's id is
    written for that.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback

    class Note(WorkerGroupCallback):
        def after_worker_group_start(self, worker_group: Any) -> None:
            group = worker_group.get_worker_group_state().placement_group_handle.placement_group
            note.write_text(group.id.hex())

    unwanted = (
        *(() if shares_stream else (DatasetsCallback,)),
        *((PlacementGroupCleanerCallback,) if in_own_ray() else ()),
    )
    added = [Note()] if in_own_ray() else []

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            return [*(one for one in super()._create_default_callbacks() if not isinstance(one, unwanted)), *added]

    return Trainer


def free_group(run: RunDir) -> None:
    """Removes what a training whose process was lost still holds of the cluster, where nobody else does. Harmless for
    one that has ended."""
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    if run.placement_group.is_file():
        group = PlacementGroup(PlacementGroupID.from_hex(run.placement_group.read_text()))
        if placement_group_table(group).get("state") not in (None, "REMOVED"):
            remove_placement_group(group)
        run.placement_group.unlink()


class _StreamFactory:
    """Builds the training stream when a group of workers starts: from the newest checkpoint there is by then."""

    def __init__(self, job: WorkerJob, data: TrainData) -> None:
        self._job, self._data = job, data

    def __call__(self) -> Any:
        config = self._job.config
        start = start_point(self._job)
        return ordered_stream(
            self._data.store,
            self._data.plan,
            start_step=read_meta(start).step if start else 0,
            num_steps=self._job.num_steps,
            global_batch_size=config.training.global_batch_size,
            micro_batch_size=config.training.micro_batch_size,
            beside_workers=config.cluster.is_elastic,
        )


def start_point(job: WorkerJob) -> Path | None:
    """The checkpoint a group of workers starts from: the newest this run has written, else the one resumed from."""
    return newest_checkpoint(job.run.checkpoints) or job.start_from


def _data_config() -> Any:
    from ray.train import DataConfig

    class InTurn(DataConfig):
        """Deals the blocks of the stream to the workers in turn (data/stream.py)."""

        def configure(self, datasets: Any, world_size: int, *_: Any, **__: Any) -> list[dict[str, Any]]:
            splits = {name: split_in_turn(dataset, world_size) for name, dataset in datasets.items()}
            return [{name: parts[rank] for name, parts in splits.items()} for rank in range(world_size)]

    return InTurn()


def _backend(config: TrainConfig, resources: Resources) -> str:
    """The process group's. Offloaded gradients of FSDP lie in host memory, and their norm is a collective there."""
    if not resources.use_gpu:
        return "gloo"
    return "cpu:gloo,cuda:nccl" if config.strategy == "fsdp" and config.fsdp_or_default.cpu_offload else "nccl"


def _train_function(settings: dict[str, Any]) -> None:
    """The entry of a Ray Train worker: turns Ray's context into plain values.

    An error the user can mend is written down and ends the worker quietly: Ray Train would restart it in vain.
    """
    import ray.train
    import torch

    # Not above: the driver and Ray Train's controller import this file too, and need no model code.
    from raylm.training.hardware import keep_freed_memory
    from raylm.training.worker import run_worker

    job: WorkerJob = settings["job"]
    if job.run.failure.exists():
        return
    context = ray.train.get_context()
    try:
        if not (job.run.path / CONFIG_FILE).is_file():
            raise ClusterError(
                str(job.run.path), "is not visible on all nodes.", "Set run.storage_path to shared storage."
            )
        if torch.cuda.is_available() and ray.get_gpu_ids():
            device = ray.train.torch.get_device()
        else:
            device = torch.device("cpu")
            keep_freed_memory()
        share = max(1, (os.cpu_count() or 1) // context.get_local_world_size())
        torch.set_num_threads(settings["threads"] or share)
        rank, world_size = context.get_world_rank(), context.get_world_size()
        own = settings["stream"]
        data = WorkerData(
            train=lambda: micro_batches(
                in_order(own()) if own else ray.train.get_dataset_shard("train"), job.config.training.micro_batch_size
            ),
            evaluation=_evaluation(settings["evaluation"], rank, world_size),
        )
        run_worker(
            replace(job, start_from=start_point(job)),
            data,
            device,
            rank=rank,
            world_size=world_size,
            node_goes_away=_node_goes_away,
        )
    except RaylmError as error:
        write_failure(job.run, error)


def _node_goes_away() -> bool:
    """Whether Ray has told this worker that a node of the run will be taken away.

    `ray.train.get_preemption_info` says the same and is a barrier of all workers, at every step; the loop has one of
    its own.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None


def _evaluation(blocks: list[Any], rank: int, world_size: int) -> Callable[[], Iterable[MicroBatch]] | None:
    import ray

    if not blocks:
        return None

    def read() -> Iterator[MicroBatch]:
        for block in blocks[rank::world_size]:
            yield to_micro_batch(ray.get(block))

    return read


def _raise_failure(run: RunDir) -> None:
    if run.failure.is_file():
        failure = json.loads(run.failure.read_text())
        raise getattr(errors, failure["kind"])(*failure["arguments"])


def _as_training_error(error: Exception, run: RunDir) -> Exception:
    """What Ray Train gives up with, in one sentence for lost workers; faults in the code keep their traceback."""
    failures = getattr(error, "worker_failures", None)
    if not failures:
        return error
    first = next(iter(failures.values()))
    if any(kind in type(first).__name__ for kind in ("ActorDied", "WorkerDied", "WorkerHealthCheck")):
        reason = run.stuck.read_text() if run.stuck.is_file() else str(first).splitlines()[0]
        return TrainingError(
            "training",
            f"workers were lost more often than cluster.max_failures allows: {reason}",
            "Continue with training.resume=auto.",
        )
    return error
