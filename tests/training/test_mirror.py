import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from raylm.config import TrainConfig
from raylm.errors import CheckpointError
from raylm.training import mirror as mirror_module
from raylm.training.checkpoint import CheckpointMeta, list_checkpoints, newest_checkpoint, state_file
from raylm.training.checkpoint_writer import CheckpointWriter
from raylm.training.mirror import Mirror, fetch, newest_in_mirror
from raylm.training.run import _resume_point
from raylm.training.run_dir import RunDir
from raylm.training.state import Piece
from tests.training.support import Rows, make_config, read_checkpoint, run_in_process

ROWS = Rows()
IDENTITY = {"setting": 1}


@pytest.fixture(params=["folder", "s3"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "mirror")
    request.getfixturevalue("bucket")
    return "s3://data/runs/a"


def _config(model: Path, run_dir: Path, address: str, *more: str) -> TrainConfig:
    return make_config(
        model, run_dir, f"checkpoint.mirror={address}", "checkpoint.interval_steps=2", "checkpoint.keep_last=1", *more
    )


def _curve(lines: list[dict[str, Any]]) -> list[float]:
    return [line["train/loss"] for line in lines]


def test_a_run_goes_on_from_the_mirror_when_its_folder_is_lost(
    tiny_model_dir: Path, tmp_path: Path, address: str
) -> None:
    whole = run_in_process(make_config(tiny_model_dir, tmp_path / "whole"), ROWS)
    config = _config(tiny_model_dir, tmp_path / "run", address)
    run_in_process(config, ROWS, stop_after=5)
    assert newest_in_mirror(address) == f"{address}/step-00000004"
    shutil.rmtree(tmp_path / "run")
    run = RunDir(tmp_path / "run")
    start = _resume_point(_config(tiny_model_dir, tmp_path / "run", address, "training.resume=auto"), run, IDENTITY)
    assert start == run.checkpoints / "step-00000004"
    lines = run_in_process(config, ROWS, start_from=start, start=4)
    assert _curve(lines) == _curve(whole)[4:]
    expected, got = (
        read_checkpoint(list_checkpoints(tmp_path / name / "checkpoints")[-1]) for name in ("whole", "run")
    )
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


@pytest.mark.usefixtures("bucket")
def test_an_address_names_the_checkpoint_of_another_run(tiny_model_dir: Path, tmp_path: Path) -> None:
    address = "s3://data/runs/a"
    run_in_process(_config(tiny_model_dir, tmp_path / "first", address, "training.max_steps=2"), ROWS)
    run = RunDir(tmp_path / "second")
    config = make_config(tiny_model_dir, run.path, f"training.resume={address}/step-00000002")
    assert _resume_point(config, run, IDENTITY) == run.fetched / "step-00000002"
    assert newest_checkpoint(run.checkpoints) is None
    with pytest.raises(CheckpointError, match="was made with setting=1, the configuration says 2"):
        _resume_point(config, run, {"setting": 2})
    absent = make_config(tiny_model_dir, run.path, f"training.resume={address}/step-00000009")
    with pytest.raises(CheckpointError, match="step-00000009: is not a complete checkpoint"):
        _resume_point(absent, run, IDENTITY)


def _save(root: Path, step: int, mirror: Mirror | None, *, keep_last: int = 2) -> None:
    writer = CheckpointWriter(root, keeper=mirror, keep_last=keep_last)
    writer.save({"a": Piece(torch.full((4,), step), 0, (4,))}, CheckpointMeta(step, {}))
    writer.wait()


def _names(address: str) -> set[str]:
    system, base = mirror_module._place(address)
    return mirror_module._complete(system, base)


def test_the_mirror_holds_what_the_run_holds(tmp_path: Path, address: str) -> None:
    """C03: a copy without its description, as an upload that was cut off leaves it, does not count and is replaced."""
    assert newest_in_mirror(address) is None
    mirror = Mirror(address)
    for step in (1, 2, 3):
        _save(tmp_path / "run", step, mirror)
    assert _names(address) == {"step-00000002", "step-00000003"}
    system, base = mirror_module._place(address)
    system.delete_file(f"{base}/step-00000003/checkpoint.json")
    assert newest_in_mirror(address) == f"{address}/step-00000002"
    with pytest.raises(CheckpointError, match="is not a complete checkpoint"):
        fetch(f"{address}/step-00000003", tmp_path / "new")
    _save(tmp_path / "run", 4, mirror, keep_last=3)
    assert _names(address) == {"step-00000002", "step-00000003", "step-00000004"}
    with system.open_output_stream(f"{base}/step-00000004/{state_file(0, 1)}") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="is not a complete checkpoint"):
        fetch(f"{address}/step-00000004", tmp_path / "new")
    assert not any((tmp_path / "new").iterdir())
    assert read_checkpoint(fetch(f"{address}/step-00000003", tmp_path / "new"))["a"].tolist() == [3] * 4


def test_a_storage_that_is_away_for_a_while_catches_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mirror_module, "ATTEMPTS", 1)
    (tmp_path / "away").write_text("a file where the folder should be")
    mirror = Mirror(str(tmp_path / "away" / "a"))
    _save(tmp_path / "run", 1, mirror)
    assert "step-00000001 is not in" in caplog.text
    with pytest.raises(CheckpointError, match=r"does not hold the newest checkpoint: .*It lies in .*step-00000001"):
        mirror.close()
    (tmp_path / "away").unlink()
    _save(tmp_path / "run", 2, mirror)
    mirror.close()
    assert _names(str(tmp_path / "away" / "a")) == {"step-00000001", "step-00000002"}


def test_what_other_runs_have_below_a_mirror_is_not_its_own(tmp_path: Path, address: str) -> None:
    """As the trials of a sweep have, below the mirror of their base."""
    _save(tmp_path / "trial", 1, Mirror(f"{address}/0003"))
    _save(tmp_path / "trial", 2, Mirror(f"{address}/0003"))
    assert newest_in_mirror(address) is None
    mirror = Mirror(address)
    _save(tmp_path / "run", 2, mirror)
    _save(tmp_path / "run", 3, mirror, keep_last=1)
    assert _names(address) == {"step-00000003"}
    assert _names(f"{address}/0003") == {"step-00000001", "step-00000002"}
