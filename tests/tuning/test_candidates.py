"""The trainings of a sweep are held against everything that is known before Ray starts."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from raylm.config import SweepConfig, load_config
from raylm.errors import ClusterError, ConfigError, DataError, ModelError, RaylmError
from raylm.tuning.candidates import Candidates
from tests.conftest import PAIRS


@pytest.fixture
def settings(tiny_model_dir: Path, write_dataset: Any, tmp_path: Path) -> dict[str, Any]:
    return {
        "base": {
            "model": {"path": str(tiny_model_dir)},
            "data": {"train": str(write_dataset(PAIRS)), "max_seq_len": 64},
            "training": {"global_batch_size": 4, "max_steps": 4},
        },
        "dir": str(tmp_path / "sweep"),
        "space": {"optimizer.learning_rate": {"loguniform": [1e-5, 1e-3]}},
        "budget": {"trials": 4},
    }


def candidates(settings: dict[str, Any], overrides: dict[str, Any] | None = None) -> Candidates:
    config = load_config(SweepConfig, settings, overrides or {})
    return Candidates(config, Path(config.dir))


def test_a_trial_has_its_own_folder_and_leaves_no_model(settings: dict[str, Any], tmp_path: Path) -> None:
    found = candidates(settings, {"set": {"training.max_steps": 2}, "resources.num_workers": 2})
    found.check()
    trial = found.build(3, {"optimizer.learning_rate": 5e-4})
    assert trial.run.dir == str(tmp_path / "sweep" / "trials" / "0003")
    assert trial.optimizer.learning_rate == 5e-4
    assert trial.training.max_steps == 2
    assert trial.cluster.num_workers == 2
    assert trial.cluster.cpus_per_worker == 1
    assert not trial.export.enabled
    assert (trial.metrics.group, trial.metrics.run_name) == ("sweep", "sweep-0003")
    assert found.metric(trial) == "train/loss"
    assert found.report_interval(trial) is None


def test_every_reported_loss_has_a_checkpoint(settings: dict[str, Any], write_dataset: Any) -> None:
    evaluation = {"set": {"data.eval": str(write_dataset(PAIRS[:4], "e.json")), "training.eval_interval_steps": 2}}
    found = candidates(settings, evaluation)
    trial = found.build(0, {})
    assert found.metric(trial) == "eval/loss"
    assert (trial.checkpoint.interval_steps, found.report_interval(trial)) == (2, 2)
    with pytest.raises(ConfigError, match=r"3 does not divide training.eval_interval_steps=2"):
        candidates(settings, {"set": {**evaluation["set"], "checkpoint.interval_steps": 3}}).check()


@pytest.mark.parametrize(
    ("override", "kind", "message"),
    [
        (
            {"space.optimizer.learnin_rate": {"choice": [1]}},
            ConfigError,
            "unknown key optimizer.learnin_rate. Did you mean optimizer.learning_rate",
        ),
        (
            {"space.optimizer.weight_decay": {"uniform": [-1, 1]}},
            ConfigError,
            "trial with .*weight_decay=-1: .*equal to 0",
        ),
        ({"space.run.dir": {"choice": ["a"]}}, ConfigError, "space.run.dir: is set by the sweep"),
        ({"set.training.resume": "auto"}, ConfigError, "set.training.resume: is set by the sweep"),
        ({"base.training.resume": "auto"}, ConfigError, "excludes a sweep, whose trials begin anew"),
        ({"set.optimizer.learning_rate": 1}, ConfigError, "is in the space as well"),
        ({"space.optimizer.name": {"choice": ["adamw", "lyon"]}}, ConfigError, "'lyon' is not an optimizer. Did you"),
        (
            {"space.optimizer.name": {"choice": ["adamw", "schedulefree_sgd"]}},
            ConfigError,
            "trial with .*optimizer.name=schedulefree_sgd: .*excludes schedule.name=cosine",
        ),
        ({"space.data.max_seq_len": {"integers": [64, 512]}}, ModelError, "512 is above the 256 positions"),
        ({"space.data.train": {"choice": ["absent.json"]}}, DataError, "absent.json: there is no such file"),
        ({"metric": "eval/loss"}, ConfigError, "metric: eval/loss needs data.eval"),
        ({"metric": "loss"}, ConfigError, "'loss' is no figure of a run"),
        ({"scheduler": "asha"}, ConfigError, "they report at their end only. Set checkpoint.interval_steps"),
        (
            {
                "scheduler": "pbt",
                "set.checkpoint.interval_steps": 2,
                "space.training.global_batch_size": {"choice": [2, 4]},
            },
            ConfigError,
            "training.global_batch_size: cannot change within a training",
        ),
        (
            {
                "scheduler": "pbt",
                "set.checkpoint.interval_steps": 2,
                "set.optimizer.name": "galore",
                "space.optimizer.options.rank": {"choice": [2, 4]},
            },
            ConfigError,
            "optimizer.options.rank: cannot change within a training",
        ),
        (
            {
                "scheduler": "pbt",
                "set.checkpoint.interval_steps": 2,
                "set.optimizer.name": "schedulefree_adamw",
                "set.schedule.name": "constant",
                "space.optimizer.options.betas": {"choice": [[0.9, 0.99], [0.8, 0.99]]},
            },
            ConfigError,
            "options.betas: cannot change within a training with schedulefree_adamw: its averaged weights",
        ),
        (
            {"space.optimizer.weight_decay": {"choice": [1], "when": {"optimizer.nam": 1}}},
            ConfigError,
            "space.optimizer.weight_decay: when: unknown key optimizer.nam. Did you mean optimizer.name",
        ),
        (
            {"space.optimizer.weight_decay": {"choice": [1], "when": {"optimizer.name": ["adamw", "lyon"]}}},
            ConfigError,
            "space.optimizer.weight_decay: when: optimizer.name is never 'lyon'. Did you mean lion",
        ),
        (
            {"space.optimizer.weight_decay": {"choice": [1], "when": {"training.method": "lorra"}}},
            ConfigError,
            "space.optimizer.weight_decay: when: training.method is never 'lorra': input should be 'full', 'lora'",
        ),
        ({"set.training.max_stepz": 1}, ConfigError, "^set: unknown key training.max_stepz. Did you mean training.max"),
        (
            {"base.training.max_stepz": 1},
            ConfigError,
            "^base: unknown key training.max_stepz. Did you mean training.max",
        ),
        ({"base.training.max_steps": "many"}, ConfigError, "^base: training.max_steps='many' is not valid"),
        ({"set.training.max_steps": "many"}, ConfigError, "^set: training.max_steps='many' is not valid"),
        (
            {"space.training.method": {"choice": ["full", "lorra"]}},
            ConfigError,
            "^trial with .* training.method=lorra: training.method='lorra' is not valid",
        ),
        (
            {"resources.num_workers": 3},
            ConfigError,
            "^trial with .*, resources: training.global_batch_size=4 must be a multiple .* = 3",
        ),
        (
            {"base.cluster.num_workers": 2, "resources.gpus_per_worker": 0.5},
            ConfigError,
            "resources.gpus_per_worker: 0.5 excludes cluster.num_workers=2",
        ),
        ({"resources.cpus_per_worker": 9999}, ClusterError, "^resources: a trial takes 9,999 CPUs, 9999 a worker, and"),
        ({"metric": "train/los"}, ConfigError, "metric: 'train/los' is no figure of a run. Did you mean train/loss"),
        (
            {"search": {"name": "optuna", "objectives": [{"metric": "eval/loss"}]}},
            ConfigError,
            "search.objectives.0.metric: eval/loss needs data.eval",
        ),
        (
            {"search": {"name": "optuna", "objectives": [{"metric": "train/loss"}]}},
            ConfigError,
            "search.objectives.0.metric: train/loss is the metric already",
        ),
        (
            {"scheduler": {"name": "asha", "grace_steps": 4}, "set.checkpoint.interval_steps": 1},
            ConfigError,
            "scheduler.grace_steps: 4 is no step before the end of any trial: .* takes 4 steps. Set it below 4",
        ),
        (
            {"scheduler": {"name": "pbt", "interval_steps": 99}, "set.checkpoint.interval_steps": 1},
            ConfigError,
            "scheduler.interval_steps: 99 is no step before the end",
        ),
        ({"retrain_best": True, "retrain_set": {"training.max_stepz": 8}}, ConfigError, "retrain_set: .*max_stepz"),
        ({"retrain_best": True, "retrain_set": {"data.train": "no.json"}}, DataError, "retrain_set: .*no.json"),
        ({"base.cluster": {"num_workers": [1, 2]}, "set.training.global_batch_size": 4}, ConfigError, "is elastic"),
    ],
)
def test_what_is_wrong_is_told_before_anything_starts(
    settings: dict[str, Any],
    override: dict[str, Any],
    kind: type[RaylmError],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On this machine, whatever Ray the tests have running."""
    monkeypatch.setattr("raylm.tuning.candidates.is_local", lambda _: True)
    with pytest.raises(kind, match=message):
        candidates(settings, override).check()


def test_in_a_large_space_every_value_is_looked_at(settings: dict[str, Any]) -> None:
    """Also those of the first keys, which would be last in turn, and those that depend on two others."""
    keys = {f"data.mixture.{letter}": {"choice": list(range(20))} for letter in "abcd"}
    when = {"data.mixture.a": 19, "data.mixture.d": 7}
    space = {**keys, "optimizer.weight_decay": {"choice": [0.25, 0.75], "when": when}}
    found = candidates({**settings, "space": {"optimizer.learning_rate": {"choice": [1e-4]}}})
    found.config = SimpleNamespace(space=load_config(SweepConfig, settings, {"space": space}).space, seed=0)  # type: ignore[assignment]
    corners = found.corners()
    for key in keys:
        assert {settings[key] for settings in corners} == set(range(20))
    decays = [settings for settings in corners if "optimizer.weight_decay" in settings]
    assert {settings["optimizer.weight_decay"] for settings in decays} == {0.25, 0.75}
    assert all(settings["data.mixture.a"] == 19 and settings["data.mixture.d"] == 7 for settings in decays)
    assert len(corners) < 200


def test_every_point_of_a_grid_is_built(settings: dict[str, Any]) -> None:
    grid = {
        "search": "grid",
        "space": {
            "training.global_batch_size": {"choice": [1, 2, 3, 4]},
            "training.micro_batch_size": {"choice": [1, 2]},
        },
    }
    with pytest.raises(ConfigError, match=r"global_batch_size=1 training.micro_batch_size=2: .*multiple"):
        candidates({**settings, **grid}).check()
    grid["space"]["training.micro_batch_size"]["when"] = {"training.global_batch_size": [2, 4]}  # type: ignore[index]
    found = candidates({**settings, **grid})
    found.check()
    assert len(found.points()) == 6


def test_faults_of_a_base_in_a_file_name_the_file(settings: dict[str, Any], tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump({**settings["base"], "optimizer": {"learning_rte": 1}}))
    with pytest.raises(ConfigError, match=rf"^base {base}: unknown key optimizer.learning_rte. Did you mean"):
        candidates({**settings, "base": str(base)})


def test_a_setting_that_no_dimension_is_taken_for_keeps_the_value_of_the_base(settings: dict[str, Any]) -> None:
    """Conditions of others see it."""
    space = {
        "optimizer.name": {"choice": ["lion"], "when": {"training.method": "lora"}},
        "optimizer.weight_decay": [
            {"choice": [0.1], "when": {"optimizer.name": "adamw"}},
            {"choice": [0.2], "when": {"optimizer.name": "lion"}},
        ],
    }
    found = candidates({**settings, "space": space})
    assert found.corners() == [{"optimizer.weight_decay": 0.1}]


def test_a_space_without_a_condition_that_holds_is_refused(settings: dict[str, Any]) -> None:
    space = {"optimizer.weight_decay": {"choice": [0.1], "when": {"training.method": "lora"}}}
    with pytest.raises(ConfigError, match="space: no `when` ever holds: all trials would be the base"):
        candidates({**settings, "space": space}).check()


def test_a_condition_that_never_holds_here_is_told(settings: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """A file of a space may serve several bases."""
    candidates(settings, {"space.optimizer.weight_decay": {"choice": [0.1], "when": {"training.method": "lora"}}})
    assert caplog.messages == ["space.optimizer.weight_decay: when: training.method is never lora, but full"]


@pytest.mark.parametrize("options", ["", "?region=eu-west-1&scheme=http"])
def test_each_training_of_a_sweep_has_a_mirror_of_its_own(settings: dict[str, Any], options: str) -> None:
    found = candidates(settings, {"base.checkpoint.mirror": f"s3://bucket/sweep{options}"})
    chosen = {"optimizer.learning_rate": 1e-3}
    assert found.build(3, chosen).checkpoint.mirror == f"s3://bucket/sweep/0003{options}"
    assert found.retraining(chosen, {}).checkpoint.mirror == f"s3://bucket/sweep/retrained{options}"
    assert candidates(settings).retraining(chosen, {}).checkpoint.mirror is None
