"""Checkpoints for resuming: complete or absent, verified when read, and never more than asked for.

A checkpoint is a folder `step-00000020` with state.safetensors, and checkpoint.json with the position, what the run
was configured as, and the size and SHA-256 of the weights file. It is written under a hidden name, flushed to disk and
renamed; a process that dies or a disk that fills leaves the former checkpoint as the newest.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
STATE_FILE = "state.safetensors"
META_FILE = "checkpoint.json"


@dataclass(frozen=True, slots=True)
class CheckpointMeta:
    """What a checkpoint says of itself. step: optimizer steps done; eval_loss: nats per token, when it was evaluated;
    identity: the settings that resuming may not change."""

    step: int
    identity: Mapping[str, Any]
    eval_loss: float | None = None
    format: int = FORMAT
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


def save_checkpoint(root: Path, state: "Mapping[str, Tensor]", meta: CheckpointMeta) -> Path:
    """Writes `root`/step-N and returns it. Raises CheckpointError when the disk is full or not writable."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    target = root / f"step-{meta.step:08d}"
    scratch = root / f".{target.name}.{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        # safetensors refuses tensors that share memory, and 0-d counters may.
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, scratch / STATE_FILE)
        files = {STATE_FILE: {"bytes": (scratch / STATE_FILE).stat().st_size, "sha256": _sha256(scratch / STATE_FILE)}}
        (scratch / META_FILE).write_text(json.dumps({**asdict(meta), "files": files}, indent=1))
        for name in (STATE_FILE, META_FILE):
            _flush(scratch / name)
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)
        _flush(root)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            str(target),
            f"cannot be written: {error}.",
            "The checkpoints before it are kept: make room and continue with training.resume=auto.",
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def list_checkpoints(root: Path) -> list[Path]:
    """The checkpoints of a run that are complete by their sizes, oldest first."""
    if not root.is_dir():
        return []
    return [path for path in sorted(root.glob("step-*")) if _is_complete(path)]


def newest_checkpoint(root: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    return next(iter(reversed(list_checkpoints(root))), None)


@dataclass(frozen=True, slots=True)
class CheckpointReport:
    """One checkpoint of a run as `raylm checkpoints` shows it. problem: empty for one that can be resumed from."""

    path: str
    step: int
    num_bytes: int
    eval_loss: float | None
    problem: str


def verify_checkpoints(root: Path) -> list[CheckpointReport]:
    """All checkpoints of a run, oldest first, each read whole and held against its digest.

    Raises CheckpointError when the folder is not there.
    """
    if not root.is_dir():
        raise CheckpointError(str(root), "there is no such folder.", "Give a run directory, such as runs/train.")
    reports = []
    for path in sorted(root.glob("step-*")):
        num_bytes = sum(file.stat().st_size for file in path.glob("*") if file.is_file())
        step, loss, problem = int(path.name.removeprefix("step-")), None, ""
        try:
            meta = read_meta(path)
            loss = meta.eval_loss
            _check_digest(path, meta)
        except CheckpointError as error:
            problem = error.problem
        reports.append(CheckpointReport(str(path), step, num_bytes, loss, problem))
    return reports


def read_meta(path: Path) -> CheckpointMeta:
    """The description of a checkpoint. Raises CheckpointError when it is missing, incomplete or of a newer raylm."""
    if not path.is_dir():
        raise CheckpointError(str(path), "there is no such checkpoint.", "Set training.resume=auto or a step-… folder.")
    if not _is_complete(path):
        raise CheckpointError(str(path), "is not a complete checkpoint.", "Choose another with training.resume=PATH.")
    raw = json.loads((path / META_FILE).read_text())
    if raw["format"] != FORMAT:
        raise CheckpointError(str(path), f"has format {raw['format']}, this raylm reads {FORMAT}.")
    return CheckpointMeta(**raw)


def load_state(path: Path, meta: CheckpointMeta) -> "dict[str, Tensor]":
    """The tensors of a checkpoint on the CPU. Raises CheckpointError when the file is not what was written."""
    from safetensors.torch import load_file

    _check_digest(path, meta)
    return load_file(path / STATE_FILE)


def _check_digest(path: Path, meta: CheckpointMeta) -> None:
    if _sha256(path / STATE_FILE) != meta.files[STATE_FILE]["sha256"]:
        raise CheckpointError(
            str(path), f"{STATE_FILE} is damaged: its SHA-256 differs.", "Delete the folder to use an older one."
        )


def prune(root: Path, *, keep_last: int, keep_best: bool) -> None:
    """Deletes all but the newest `keep_last` checkpoints and, with keep_best, the one of lowest evaluation loss."""
    found = list_checkpoints(root)
    keep = set(found[-keep_last:])
    scored = [(meta.eval_loss, path) for path in found if (meta := read_meta(path)).eval_loss is not None]
    if keep_best and scored:
        keep.add(min(scored)[1])
    for path in found:
        if path not in keep:
            shutil.rmtree(path, ignore_errors=True)
    for leftover in root.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def check_identity(path: Path, meta: CheckpointMeta, identity: Mapping[str, Any]) -> None:
    """Raises CheckpointError naming the first setting in which a checkpoint and the configuration differ."""
    for key in sorted({*meta.identity, *identity}):
        was, now = meta.identity.get(key), identity.get(key)
        if was != now:
            raise CheckpointError(
                str(path),
                f"was made with {key}={_short(was)}, the configuration says {_short(now)}.",
                "Set it back, or choose a new run.dir.",
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_complete(path: Path) -> bool:
    try:
        files = json.loads((path / META_FILE).read_text())["files"]
        return all((path / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """To the disk. A file that cannot be flushed is an error; some shared file systems cannot flush a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)
