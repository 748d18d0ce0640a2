"""Checkpoints for resuming: complete or absent, verified when read, and never more than asked for.

A checkpoint is a folder `step-00000020`. Each rank's pieces of the state lie in a file of their own,
`state-00001-of-00002.safetensors`, under `NAME@START` (training/state.py); checkpoint.json has the position, what the
run was configured as, the shape of each tensor, and the size and SHA-256 of each file (written by
checkpoint_writer.py).
"""

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 2
META_FILE = "checkpoint.json"


def state_file(rank: int, world_size: int) -> str:
    """The file of one rank's pieces."""
    return f"state-{rank:05d}-of-{world_size:05d}.safetensors"


def checkpoint_name(step: int) -> str:
    """The folder of a step."""
    return f"step-{step:08d}"


@dataclass(frozen=True, slots=True)
class CheckpointMeta:
    """What a checkpoint says of itself. step: optimizer steps done; eval_loss: nats per token, when it was evaluated;
    identity: the settings that resuming may not change; files: name -> bytes and sha256; shapes: of whole tensors."""

    step: int
    identity: Mapping[str, Any]
    eval_loss: float | None = None
    format: int = FORMAT
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)


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
            _check_digests(path, meta, sorted(meta.files))
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


def open_state(path: Path, meta: CheckpointMeta, *, rank: int = 0, world_size: int = 1) -> "SavedState":
    """The tensors of a checkpoint on the CPU, read one at a time. Of the files, each rank verifies its share.

    Raises CheckpointError when a file is not what was written.
    """
    _check_digests(path, meta, sorted(meta.files)[rank::world_size])
    return SavedState(path, meta)


class SavedState(Mapping[str, "Tensor"]):
    """Whole tensors by name, put together from pieces when they are asked for."""

    def __init__(self, path: Path, meta: CheckpointMeta) -> None:
        """Raises CheckpointError when the pieces are not all of the tensors."""
        from safetensors import safe_open

        self._shapes = meta.shapes
        self._pieces: dict[str, list[tuple[int, Any, str]]] = {}
        for name in sorted(meta.files):
            file = safe_open(path / name, framework="pt")
            for key in file.offset_keys():
                tensor, _, start = key.rpartition("@")
                self._pieces.setdefault(tensor, []).append((int(start), file, key))
        if self._pieces.keys() != self._shapes.keys():
            odd = sorted(self._pieces.keys() ^ self._shapes.keys())[0]
            raise CheckpointError(str(path), f"has no values of {odd}, or no shape.", "Use another checkpoint.")
        self._path = path

    def __getitem__(self, name: str) -> "Tensor":
        import torch

        shape, parts, end = self._shapes[name], [], 0
        for start, file, key in sorted(self._pieces[name], key=lambda piece: piece[0]):
            parts.append(file.get_tensor(key).flatten())
            if start != end:
                break
            end += parts[-1].numel()
        if end != math.prod(shape):
            raise CheckpointError(
                str(self._path), f"lacks elements of {name} from {end} on.", "Use another checkpoint."
            )
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)


def _check_digests(path: Path, meta: CheckpointMeta, names: list[str]) -> None:
    for name in names:
        if sha256_of(path / name) != meta.files[name]["sha256"]:
            raise CheckpointError(
                str(path), f"{name} is damaged: its SHA-256 differs.", "Delete the folder to use an older one."
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
            remove_checkpoint(path)


def remove_checkpoint(path: Path) -> None:
    """Deletes a checkpoint, if there is one: out of sight first, so that one half deleted is never seen."""
    hidden = path.with_name(f".{path.name}.deleted")
    shutil.rmtree(hidden, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


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


def sha256_of(path: Path) -> str:
    """The digest of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
