"""Checkpoints that stay: the best ever and the newest, without room of their own."""

import os
from pathlib import Path

import pytest
import torch

from raylm.training.checkpoint import (
    CheckpointMeta,
    checkpoint_name,
    open_state,
    read_meta,
    remove_checkpoint,
    verify_checkpoints,
)
from raylm.training.checkpoint_writer import CheckpointWriter
from raylm.training.state import Piece
from raylm.tuning.pins import best_checkpoint, drop_checkpoints, link_checkpoint, newest_pin, pin, pin_path, settle_best


def write_checkpoint(root: Path, step: int, *, keep_last: int = 1) -> Path:
    writer = CheckpointWriter(root, asynchronous=False, keep_last=keep_last)
    values = torch.full((4,), float(step))
    writer.save({"w": Piece(values, 0, (4,))}, CheckpointMeta(step, {"optimizer": "a"}))
    return root / checkpoint_name(step)


def write_weight(root: Path, step: int, weight: float) -> Path:
    """Over the checkpoint of the same step, if there is one."""
    remove_checkpoint(root / checkpoint_name(step))
    CheckpointWriter(root, asynchronous=False, keep_last=9).save(
        {"w": Piece(torch.full((4,), float(weight)), 0, (4,))}, CheckpointMeta(step, {})
    )
    return root / checkpoint_name(step)


def weights(checkpoint: Path) -> list[float]:
    return [float(value) for value in open_state(checkpoint, read_meta(checkpoint))["w"]]


def test_the_best_report_keeps_its_checkpoint_though_the_run_prunes_it(tmp_path: Path) -> None:
    """T02: 1.0, 0.2, 0.9, …; the run itself keeps one checkpoint."""
    for step, value in enumerate([1.0, 0.2, 0.9, 0.8, 0.7], start=1):
        pin(tmp_path, write_checkpoint(tmp_path / "checkpoints", step), step, value, "min")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [checkpoint_name(5)]
    assert sorted(path.name for path in (tmp_path / "pins").glob("step-*")) == [checkpoint_name(n) for n in (4, 5)]
    best = best_checkpoint(tmp_path, 2, 0.2)
    assert best is not None
    assert open_state(best, read_meta(best))["w"].tolist() == [2.0] * 4
    assert newest_pin(tmp_path) == pin_path(tmp_path, 5)
    shared = os.stat(pin_path(tmp_path, 5) / "state-00000-of-00001.safetensors")
    assert shared.st_nlink == 2
    drop_checkpoints(tmp_path, but_best=True)
    assert not list(tmp_path.glob("*/step-*"))
    assert [report.problem for report in verify_checkpoints(best.parent)] == [""]
    drop_checkpoints(tmp_path, but_best=False)
    assert not list(tmp_path.rglob("step-*"))


@pytest.mark.parametrize(("mode", "best"), [("min", (2, 1.0)), ("max", (1, 3.0))])
def test_the_mode_decides_and_the_earliest_of_equals_stays(tmp_path: Path, mode: str, best: tuple[int, float]) -> None:
    for step, value in ((1, 3.0), (2, 1.0), (3, 1.0), (4, 3.0)):
        pin(tmp_path, write_checkpoint(tmp_path / "checkpoints", step), step, value, mode)
    settle_best(tmp_path, *best)
    assert [path.name for path in (tmp_path / "pins" / "best").rglob("step-*")] == [checkpoint_name(best[0])]


def test_a_step_that_is_taken_again_does_not_replace_the_best(tmp_path: Path) -> None:
    """A trial of a population goes on from another's checkpoint of an earlier step."""
    for step, value, weight in ((1, 0.9, 1), (2, 0.5, 2), (2, 0.7, 7)):
        pin(tmp_path, write_weight(tmp_path / "checkpoints", step, weight), step, value, "min")
        settle_best(tmp_path, *min([(1, 0.9), (2, 0.5)][:step], key=lambda pair: pair[1]))
    best = best_checkpoint(tmp_path, 2, 0.5)
    assert best is not None
    assert weights(best) == [2.0] * 4
    assert weights(pin_path(tmp_path, 2)) == [7.0] * 4
    pin(tmp_path, write_weight(tmp_path / "checkpoints", 2, 8), 2, 0.4, "min")
    better = best_checkpoint(tmp_path, 2, 0.4)
    assert better is not None
    assert (weights(best), weights(better)) == ([2.0] * 4, [8.0] * 4)  # the driver may not hear of the second


def test_a_report_that_nobody_noted_costs_the_noted_best_nothing(tmp_path: Path) -> None:
    """The sweep's time is over, or its driver dead, when the trial pins its next report."""
    pin(tmp_path, write_checkpoint(tmp_path / "checkpoints", 1), 1, 0.5, "min")
    settle_best(tmp_path, 1, 0.5)
    pin(tmp_path, write_checkpoint(tmp_path / "checkpoints", 2), 2, 0.4, "min")
    drop_checkpoints(tmp_path, but_best=True)
    assert best_checkpoint(tmp_path, 1, 0.5) is not None
    settle_best(tmp_path, 1, 0.5)  # resumed; step 2 comes out worse, step 3 is the best that is ever noted
    pin(tmp_path, write_checkpoint(tmp_path / "checkpoints", 2), 2, 0.6, "min")
    pin(tmp_path, write_checkpoint(tmp_path / "checkpoints", 3), 3, 0.45, "min")
    settle_best(tmp_path, 3, 0.45)
    assert best_checkpoint(tmp_path, 3, 0.45) is not None
    assert best_checkpoint(tmp_path, 1, 0.5) is None


def test_what_a_killed_process_left_half_done_goes(tmp_path: Path) -> None:
    for name in (".step-00000001.77.pin", ".step-00000001.deleted", "best/1/.step-00000001.77.pin"):
        (tmp_path / "pins" / name).mkdir(parents=True)
    pin(tmp_path, write_checkpoint(tmp_path / "checkpoints", 2), 2, 0.5, "min")
    assert not list((tmp_path / "pins").rglob(".*"))


def test_a_copy_is_of_other_settings_and_leaves_its_source_alone(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "a", 3)
    link_checkpoint(source, tmp_path / "b" / source.name, {"optimizer": "b"})
    copy = read_meta(tmp_path / "b" / source.name)
    assert copy.identity == {"optimizer": "b"}
    assert read_meta(source).identity == {"optimizer": "a"}
    assert open_state(tmp_path / "b" / source.name, copy)["w"].tolist() == [3.0] * 4


def test_without_hard_links_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    source = write_checkpoint(tmp_path / "a", 1)
    link_checkpoint(source, tmp_path / "b" / source.name)
    assert [report.problem for report in verify_checkpoints(tmp_path / "b")] == [""]
