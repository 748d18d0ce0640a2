"""Trials at a time, and requests that no cluster will ever meet."""

from typing import Any

import pytest

from raylm.config import TrainConfig, load_config
from raylm.config.sweep import ResourcesSection
from raylm.errors import ClusterError
from raylm.tuning.room import local_cpus, plan_room


def config(**cluster: Any) -> TrainConfig:
    return load_config(
        TrainConfig,
        {"model.path": "m", "data.train": "d", "cluster": cluster, "training.global_batch_size": 8},
    )


def test_as_many_trials_as_there_is_room_for_with_a_cpu_each_for_the_data() -> None:
    room = plan_room([config(num_workers=2, cpus_per_worker=1)], ResourcesSection(), "auto", [{"CPU": 10.0}])
    assert (room.concurrency, room.trial_cpus, room.gpus) == (3, 3, 0.0)
    assert room.resources(config(num_workers=2))["threads"] == 1


def test_parts_of_gpus_are_shared() -> None:
    nodes = [{"CPU": 16.0, "GPU": 1.0}]
    half = plan_room([config()], ResourcesSection(gpus_per_worker=0.5), "auto", nodes)
    assert half.concurrency == 2
    assert half.resources(config())["gpus_per_worker"] == 0.5
    assert half.resources(config())["use_gpu"]
    whole = plan_room([config()], ResourcesSection(), "auto", nodes)
    assert (whole.concurrency, whole.gpus) == (1, 1.0)
    none = plan_room([config()], ResourcesSection(gpus_per_worker=0), "auto", nodes)
    assert (none.concurrency, none.resources(config())["use_gpu"]) == (8, False)


@pytest.mark.parametrize(
    ("cluster", "section", "concurrency", "message"),
    [
        ({"num_workers": 4}, {}, "auto", "a trial takes 5 CPUs .1 of them for its data.* the cluster has 4"),
        ({"cpus_per_worker": 3}, {}, "auto", "no node has 3 CPUs"),
        ({}, {"gpus_per_worker": 1}, "auto", "no node has 1 CPU and 1 GPU, which"),
        ({}, {}, 3, "3 trials at a time: 6 CPUs and 0 GPUs needed, the cluster has 4 and 0. Set concurrency=2"),
    ],
)
def test_what_can_never_be_is_refused(
    cluster: dict[str, Any], section: dict[str, Any], concurrency: Any, message: str
) -> None:
    with pytest.raises(ClusterError, match=message):
        plan_room([config(**cluster)], ResourcesSection(**section), concurrency, [{"CPU": 2.0}, {"CPU": 2.0}])


def test_a_local_ray_has_room_for_the_trials_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert local_cpus([config(num_workers=2, cpus_per_worker=2)], "auto") == 10
    assert local_cpus([config()], 3) == 8
    with pytest.raises(ClusterError, match="a trial takes 16 CPUs, 4 a worker, and this machine has 8"):
        local_cpus([config(num_workers=2), config(num_workers=4, cpus_per_worker=4)], "auto")
