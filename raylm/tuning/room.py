"""How many trials run at a time, and whether one can run at all: told at once, never waited for."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raylm.config import TrainConfig
from raylm.config.sweep import ResourcesSection
from raylm.errors import ClusterError
from raylm.words import counted

DATA_CPUS = 1
"""Of each trial, for its stream of packed rows."""


@dataclass(frozen=True, slots=True)
class Room:
    """What a trial takes, and how many fit. gpus: of each worker."""

    workers: int
    cpus: int
    gpus: float
    concurrency: int

    @property
    def trial_cpus(self) -> int:
        """CPUs of one trial."""
        return self.workers * self.cpus + DATA_CPUS

    def resources(self, config: TrainConfig) -> dict[str, Any]:
        """As training/ray_trainer.py takes them, for a trial with these or fewer workers."""
        return {
            "num_workers": config.cluster.max_workers,
            "cpus_per_worker": self.cpus,
            "use_gpu": self.gpus > 0,
            "gpus_per_worker": self.gpus or 1.0,
            "threads": self.cpus,
        }


def local_cpus(configs: Sequence[TrainConfig], concurrency: int | Literal["auto"]) -> int:
    """Logical CPUs for a Ray on this machine: with room for the trials at a time, and for their data.

    Raises ClusterError when one trial alone has more workers' CPUs than the machine.
    """
    cores = os.cpu_count() or 1
    workers, cpus = _largest(configs)
    if workers * cpus > cores:
        raise ClusterError(
            "resources",
            f"a trial takes {counted(workers * cpus, 'CPU')}, {cpus} a worker, and this machine has {cores}.",
            "Ask for fewer workers or CPUs, or set cluster.address in the base.",
        )
    wanted = max(1, cores // (workers * cpus)) if concurrency == "auto" else concurrency
    return max(cores, wanted * (workers * cpus + DATA_CPUS))


def plan_room(
    configs: Sequence[TrainConfig],
    section: ResourcesSection,
    concurrency: int | Literal["auto"],
    nodes: Sequence[Mapping[str, float]],
) -> Room:
    """The room of a cluster whose nodes have these resources. configs: trainings of the sweep.

    Raises ClusterError for a trial that no node or not the whole cluster has room for, and for too many at a time.
    """
    total_cpus = int(sum(node.get("CPU", 0) for node in nodes))
    total_gpus = sum(node.get("GPU", 0) for node in nodes)
    workers, cpus = _largest(configs)
    use = configs[0].cluster.use_gpu
    default = 1.0 if use is True or (use == "auto" and total_gpus >= workers) else 0.0
    gpus = default if section.gpus_per_worker is None else section.gpus_per_worker
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        raise ClusterError(
            "resources",
            f"no node has {counted(cpus, 'CPU')} and {counted(gpus, 'GPU')}, which one worker takes.",
            "Lower resources.cpus_per_worker or resources.gpus_per_worker, or name a cluster that has them: "
            "cluster.address, or RAY_ADDRESS.",
        )
    needed = workers * cpus + DATA_CPUS
    # A worker lies on one node, and a share of a GPU on one GPU.
    slots = sum(_slots(node, cpus, gpus) for node in nodes)
    room = min(total_cpus // needed, slots // workers)
    if room < 1:
        raise ClusterError(
            "resources",
            f"a trial takes {counted(needed, 'CPU')} ({DATA_CPUS} of them for its data) and "
            f"{counted(workers * gpus, 'GPU')}, the cluster has {total_cpus} and {total_gpus:g}, room for "
            f"{counted(slots, 'worker')} on its nodes.",
            "Ask for fewer workers, CPUs or GPUs.",
        )
    if concurrency != "auto" and concurrency > room:
        raise ClusterError(
            "concurrency",
            f"{counted(concurrency, 'trial')} at a time: {counted(concurrency * needed, 'CPU')} and "
            f"{counted(concurrency * workers * gpus, 'GPU')} needed, the cluster has {total_cpus} and {total_gpus:g}.",
            f"Set concurrency={room}, or lower resources.",
        )
    return Room(workers, cpus, gpus, room if concurrency == "auto" else concurrency)


def _slots(node: Mapping[str, float], cpus: int, gpus: float) -> int:
    """Workers that a node has room for."""
    by_cpus = int(node.get("CPU", 0)) // cpus
    if not gpus:
        return by_cpus
    by_gpus = int(node.get("GPU", 0) / gpus + 1e-9) if gpus >= 1 else int(node.get("GPU", 0)) * int(1 / gpus + 1e-9)
    return min(by_cpus, by_gpus)


def _largest(configs: Sequence[TrainConfig]) -> tuple[int, int]:
    workers = max(config.cluster.max_workers for config in configs)
    return workers, max(config.cluster.cpus_per_worker or 1 for config in configs)
