"""Checkpoints that stay: the best ever and the newest, without room of their own."""

import os
from pathlib import Path

import pytest
import torch

from raylm.training.checkpoint import CheckpointMeta, checkpoint_name, open_state, read_meta, verify_checkpoints
from raylm.training.checkpoint_writer import CheckpointWriter
from raylm.training.state import Piece
from raylm.tuning.pins import drop_checkpoints, link_checkpoint, newest_pin, pin, pin_path, read_best


def write_checkpoint(root: Path, step: int, *, keep_last: int = 1) -> Path:
    writer = CheckpointWriter(root, asynchronous=False, keep_last=keep_last)
    values = torch.full((4,), float(step))
    writer.save({"w": Piece(values, 0, (4,))}, CheckpointMeta(step, {"optimizer": "a"}))
    return root / checkpoint_name(step)


def test_the_best_report_keeps_its_checkpoint_though_the_run_prunes_it(tmp_path: Path) -> None:
    """T02: 1.0, 0.2, 0.9, …; the run itself keeps one checkpoint."""
    for step, value in enumerate([1.0, 0.2, 0.9, 0.8, 0.7], start=1):
        pin(tmp_path, write_checkpoint(tmp_path / "checkpoints", step), step, value, "min")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [checkpoint_name(5)]
    assert sorted(path.name for path in (tmp_path / "pins").glob("step-*")) == [checkpoint_name(n) for n in (2, 4, 5)]
    assert read_best(tmp_path) == (2, 0.2)
    best = pin_path(tmp_path, 2)
    assert open_state(best, read_meta(best))["w"].tolist() == [2.0] * 4
    assert newest_pin(tmp_path) == pin_path(tmp_path, 5)
    shared = os.stat(pin_path(tmp_path, 5) / "state-00000-of-00001.safetensors")
    assert shared.st_nlink == 2
    drop_checkpoints(tmp_path, but_best=True)
    assert [report.problem for report in verify_checkpoints(tmp_path / "pins")] == [""]
    drop_checkpoints(tmp_path, but_best=False)
    assert not list(tmp_path.glob("*/step-*"))


@pytest.mark.parametrize(("mode", "best"), [("min", (2, 1.0)), ("max", (1, 3.0))])
def test_the_mode_decides_and_the_earliest_of_equals_stays(tmp_path: Path, mode: str, best: tuple[int, float]) -> None:
    for step, value in ((1, 3.0), (2, 1.0), (3, 1.0), (4, 3.0)):
        pin(tmp_path, write_checkpoint(tmp_path / "checkpoints", step), step, value, mode)
    assert read_best(tmp_path) == best


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
