"""Checkpoints that outlive their trial's own: the best one so far and the newest ones that were reported.

A pinned checkpoint is a folder of hard links, so it takes no room beside the one it was made of and stays when that one
is pruned; on file systems without links it is a copy. Like any checkpoint it is complete or absent.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raylm.training.checkpoint import META_FILE, checkpoint_name, list_checkpoints, remove_checkpoint

PINS_FOLDER = "pins"
BEST_FILE = "best.json"
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
    """Keeps a reported checkpoint: the best one, and the newest NEWEST_KEPT."""
    link_checkpoint(checkpoint, pin_path(trial_dir, step))
    best = read_best(trial_dir)
    if best is None or (value < best[1] if mode == "min" else value > best[1]):
        best = (step, value)
        path = trial_dir / PINS_FOLDER / BEST_FILE
        path.with_suffix(".partial").write_text(json.dumps({"step": step, "value": value}))
        path.with_suffix(".partial").rename(path)
    kept = {pin_path(trial_dir, best[0]), *sorted((trial_dir / PINS_FOLDER).glob("step-*"))[-NEWEST_KEPT:]}
    kept.add(pin_path(trial_dir, step))
    for path in (trial_dir / PINS_FOLDER).glob("step-*"):
        if path not in kept:
            remove_checkpoint(path)


def read_best(trial_dir: Path) -> tuple[int, float] | None:
    """Step and value of the best pinned checkpoint."""
    path = trial_dir / PINS_FOLDER / BEST_FILE
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    return found["step"], found["value"]


def newest_pin(trial_dir: Path) -> Path | None:
    """The newest pinned checkpoint."""
    found = list_checkpoints(trial_dir / PINS_FOLDER)
    return found[-1] if found else None


def drop_checkpoints(trial_dir: Path, *, but_best: bool) -> None:
    """Frees what a trial that has ended holds on the disk."""
    best = read_best(trial_dir)
    for path in [*trial_dir.glob("checkpoints/step-*"), *trial_dir.glob(f"{PINS_FOLDER}/step-*")]:
        if not (but_best and best and path == pin_path(trial_dir, best[0])):
            remove_checkpoint(path)
