import json
from pathlib import Path

import pytest

from raylm.config import TrainConfig, load_config
from raylm.errors import ClusterError, DataError
from raylm.training.job import write_failure
from raylm.training.ray_trainer import Resources, _raise_failure, _trainer_class, plan_resources
from raylm.training.run_dir import RunDir


def _config(**cluster: object) -> TrainConfig:
    return load_config(TrainConfig, {"model.path": "m", "data.train": "d", "cluster": cluster})


def test_cpus_are_shared_out_and_one_is_left_for_the_data() -> None:
    assert plan_resources(_config(), {"CPU": 2.0}) == Resources(1, 1, False)
    assert plan_resources(_config(num_workers=2), {"CPU": 16.0}) == Resources(2, 7, False)
    assert plan_resources(_config(num_workers=2, cpus_per_worker=3), {"CPU": 16.0}) == Resources(2, 3, False)


def test_gpus_are_used_where_each_worker_can_have_one() -> None:
    assert plan_resources(_config(num_workers=2), {"CPU": 16.0, "GPU": 2.0}) == Resources(2, 1, True)
    assert plan_resources(_config(num_workers=4), {"CPU": 16.0, "GPU": 2.0}) == Resources(4, 3, False)
    assert plan_resources(_config(use_gpu=False), {"CPU": 16.0, "GPU": 2.0}).use_gpu is False


def test_more_workers_than_the_cluster_has() -> None:
    with pytest.raises(
        ClusterError, match="4 workers of 1 CPU and one CPU for the data need 5 CPUs, the cluster has 4"
    ):
        plan_resources(_config(num_workers=4), {"CPU": 4.0})
    with pytest.raises(ClusterError, match="2 workers with a GPU each: 2 GPUs needed, the cluster has 1"):
        plan_resources(_config(num_workers=2, use_gpu=True), {"CPU": 8.0, "GPU": 1.0})


def test_a_workers_error_reaches_the_driver_as_itself(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    _raise_failure(run)
    write_failure(run, DataError("a.json", "is empty.", "Fill it."))
    write_failure(run, ClusterError("later", "is not the cause."))
    assert json.loads(run.failure.read_text())["kind"] == "DataError"
    with pytest.raises(DataError, match=r"a\.json: is empty\. Fill it\."):
        _raise_failure(run)


@pytest.mark.parametrize(("own", "watched"), [("1", False), ("0", True)])
def test_only_a_ray_of_ours_goes_without_the_watchman(own: str, watched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs Ray's state API, which the Ray that raylm starts does not have."""
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    monkeypatch.setenv("RAYLM_OWN_RAY", own)
    kinds = _callbacks(shares_stream=True)
    assert (PlacementGroupCleanerCallback in kinds) == watched
    assert len(kinds) > 3


@pytest.mark.parametrize("shares_stream", [True, False])
def test_only_workers_that_share_the_stream_have_it_dealt_out(shares_stream: bool) -> None:
    from ray.train.v2._internal.callbacks import DatasetsCallback

    kinds = _callbacks(shares_stream=shares_stream)
    assert (DatasetsCallback in kinds) == shares_stream
    assert len(kinds) > 2


def _callbacks(*, shares_stream: bool) -> list[type]:
    from ray.train import ScalingConfig

    trainer = _trainer_class(Path("unused"), shares_stream=shares_stream)(
        print, scaling_config=ScalingConfig(num_workers=1)
    )
    return [type(callback) for callback in trainer._create_default_callbacks()]
