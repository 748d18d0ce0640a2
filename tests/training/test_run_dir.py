import os
from pathlib import Path

import pytest

from raylm.config import TrainConfig, load_config
from raylm.errors import RunDirError
from raylm.training.run_dir import locate_run_dir, open_run_dir


def _config(run_dir: Path | str, *overrides: str) -> TrainConfig:
    base = {"model": {"path": "m"}, "data": {"train": "d"}, "run": {"dir": str(run_dir)}}
    return load_config(TrainConfig, base, overrides)


def test_the_resolved_configuration_is_written_and_can_be_loaded(tmp_path: Path) -> None:
    run = open_run_dir(_config(tmp_path / "run"))
    assert load_config(TrainConfig, run.path / "config.yaml") == _config(tmp_path / "run")


def test_the_folder_of_another_run_is_refused_unless_told(tmp_path: Path) -> None:
    open_run_dir(_config(tmp_path / "run"))
    (tmp_path / "run" / "old.txt").write_text("x")
    with pytest.raises(RunDirError, match=r"holds another run\. Choose another run\.dir"):
        open_run_dir(_config(tmp_path / "run"))
    open_run_dir(_config(tmp_path / "run", "training.resume=auto"))
    assert (tmp_path / "run" / "old.txt").exists()
    open_run_dir(_config(tmp_path / "run", "run.overwrite=true"))
    assert not (tmp_path / "run" / "old.txt").exists()


def test_a_run_that_took_no_step_does_not_block_its_folder(tmp_path: Path) -> None:
    open_run_dir(_config(tmp_path / "run"))
    (tmp_path / "run" / "failure.json").write_text("{}")
    (tmp_path / "run" / "events.jsonl").write_text("{}")
    run = open_run_dir(_config(tmp_path / "run", "run.seed=3"))
    assert not run.failure.exists()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}")
    with pytest.raises(RunDirError, match="holds another run"):
        open_run_dir(_config(tmp_path / "run"))


def test_a_folder_with_something_else_is_never_deleted(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunDirError, match="holds something else than a run"):
        open_run_dir(_config(tmp_path, "run.overwrite=true"))
    assert (tmp_path / "thesis.txt").exists()


def test_unwritable_places_and_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match="is a file"):
        open_run_dir(_config(tmp_path / "file"))
    with pytest.raises(RunDirError, match="cannot be written"):
        open_run_dir(_config("/proc/no/run"))


def test_relative_folders_in_a_job_need_a_storage_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert locate_run_dir(_config("runs/a")) == Path(os.getcwd()) / "runs/a"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(RunDirError, match="a Ray job runs in a temporary folder"):
        locate_run_dir(_config("runs/a"))
    assert locate_run_dir(_config("runs/a", f"run.storage_path={tmp_path}")) == tmp_path / "runs/a"
    with pytest.raises(RunDirError, match="is not absolute"):
        locate_run_dir(_config("runs/a", "run.storage_path=shared"))
