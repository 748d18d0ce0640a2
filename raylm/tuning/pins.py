"""Checkpoints that outlive their trial's own: the best one so far and the newest ones that were reported.

A pinned checkpoint is a folder of hard links, so it takes no room beside the one it was made of and stays when that one
is pruned; on file systems without links it is a copy. Like any checkpoint it is complete or absent.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raylm.training.checkpoint import META_FILE, checkpoint_name, list_checkpoints, remove_checkpoint

PINS_FOLDER = "pins"
BEST_FILE, BEST_FOLDER = "best.json", "best"
NEWEST_KEPT = 2


def link_checkpoint(source: Path, target: Path, identity: Mapping[str, Any] | None = None) -> None:
    """Makes `target` the same checkpoint. identity: the settings it shall be of, if not its own."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}.pin")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    for file in source.iterdir():
        if file.name == META_FILE and identity is not None:
            meta = {**json.loads(file.read_text()), "identity": dict(identity)}
            (scratch / file.name).write_text(json.dumps(meta, indent=1))
        else:
            _link(file, scratch / file.name)
    remove_checkpoint(target)
    scratch.rename(target)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def pin_path(trial_dir: Path, step: int) -> Path:
    """Where a trial's checkpoint of a reported step is pinned."""
    return trial_dir / PINS_FOLDER / checkpoint_name(step)


def pin(trial_dir: Path, checkpoint: Path, step: int, value: float, mode: str) -> None:
    """Keeps a reported checkpoint: the best one in a folder of its own, and the newest NEWEST_KEPT.

    Former best ones stay until the driver has noted the report (`settle_best`): where it dies before, or ends the trial
    without hearing of it, they are the best it knows."""
    _drop_leavings(trial_dir)
    link_checkpoint(checkpoint, pin_path(trial_dir, step))
    found = _read_bests(trial_dir)
    if not found or (value < found[-1].value if mode == "min" else value > found[-1].value):
        best = _Best(step, value, max((one.place for one in found), default=0) + 1)
        link_checkpoint(checkpoint, _best_path(trial_dir, best))
        _write_bests(trial_dir, [*found, best])
    newest = sorted((trial_dir / PINS_FOLDER).glob("step-*"))[-NEWEST_KEPT:]
    for path in (trial_dir / PINS_FOLDER).glob("step-*"):
        if path not in newest and path != pin_path(trial_dir, step):
            remove_checkpoint(path)


@dataclass(frozen=True, slots=True)
class _Best:
    """One that was the best when it was pinned. place: number of its folder; a step may be pinned again, by a trial
    that took it twice."""

    step: int
    value: float
    place: int


def _best_path(trial_dir: Path, best: _Best) -> Path:
    return trial_dir / PINS_FOLDER / BEST_FOLDER / str(best.place) / checkpoint_name(best.step)


def _read_bests(trial_dir: Path) -> list[_Best]:
    """Each better than the one before."""
    path = trial_dir / PINS_FOLDER / BEST_FILE
    return [_Best(**one) for one in json.loads(path.read_text())] if path.is_file() else []


def _write_bests(trial_dir: Path, bests: Sequence[_Best]) -> None:
    """What is not among them is deleted afterwards."""
    path = trial_dir / PINS_FOLDER / BEST_FILE
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps([asdict(best) for best in bests]))
    partial.rename(path)
    kept = {str(best.place) for best in bests}
    for folder in (trial_dir / PINS_FOLDER / BEST_FOLDER).glob("*"):
        if folder.name not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def _drop_leavings(trial_dir: Path) -> None:
    """What a process that was killed here left half done."""
    pins = trial_dir / PINS_FOLDER
    for path in [*pins.glob(".step-*"), *pins.glob(f"{BEST_FOLDER}/*/.step-*")]:
        shutil.rmtree(path, ignore_errors=True)


def settle_best(trial_dir: Path, step: int, value: float) -> None:
    """Keeps of the best checkpoints only that of the best report the driver has noted, so that the next are held
    against this one. Does nothing where it has no checkpoint."""
    found = _read_bests(trial_dir)
    kept = [best for best in found if (best.step, best.value) == (step, value)][-1:]
    if kept and kept != found:
        _write_bests(trial_dir, kept)


def best_checkpoint(trial_dir: Path, step: int, value: float) -> Path | None:
    """The checkpoint of a trial's best report; None where it is gone."""
    for best in reversed(_read_bests(trial_dir)):
        path = _best_path(trial_dir, best)
        if (best.step, best.value) == (step, value) and path.is_dir():
            return path
    return None


def newest_pin(trial_dir: Path) -> Path | None:
    """The newest pinned checkpoint."""
    found = list_checkpoints(trial_dir / PINS_FOLDER)
    return found[-1] if found else None


def drop_checkpoints(trial_dir: Path, *, but_best: bool) -> None:
    """Frees what a trial that has ended holds on the disk."""
    _drop_leavings(trial_dir)
    for path in [*trial_dir.glob("checkpoints/step-*"), *trial_dir.glob(f"{PINS_FOLDER}/step-*")]:
        remove_checkpoint(path)
    if not but_best and _read_bests(trial_dir):
        _write_bests(trial_dir, [])
