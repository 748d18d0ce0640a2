"""Writes checkpoints beside the training: the ranks' files first, then rank 0's description, under a hidden name.

A rank copies its pieces into host memory and trains on; a thread writes them. Rank 0's thread waits for the other
ranks' files, describes them, flushes, and renames the folder: a process that dies or a disk that fills leaves the
former checkpoint as the newest. The hidden name holds a token of this group of workers, so that files of one that died
never mix in.

Ray Train's own checkpoints (`CheckpointUploadMode.ASYNC`) are not used: they copy a finished folder once more, know no
digests, and count one as complete that a worker has left half.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from raylm.errors import CheckpointError
from raylm.training.checkpoint import (
    META_FILE,
    CheckpointMeta,
    checkpoint_name,
    prune,
    remove_checkpoint,
    sha256_of,
    state_file,
)

if TYPE_CHECKING:
    from torch import Tensor

    from raylm.training.state import Piece

OTHERS_S = 1800.0
"""How long rank 0 waits for the others' files once its own is written."""
_POLL_S = 0.05


class Keeper(Protocol):
    """Is told of each new checkpoint, from the writing thread of rank 0."""

    def written(self, path: Path) -> None:
        """path: the newest checkpoint, complete, old ones deleted already."""
        ...

    def close(self) -> None:
        """At the end of the run. Raises CheckpointError for what could not be kept."""
        ...


class CheckpointWriter:
    """One rank's writer. Errors of the writing thread are raised by the next call of any method."""

    def __init__(
        self,
        root: Path,
        *,
        rank: int = 0,
        world_size: int = 1,
        token: str = "alone",
        asynchronous: bool = True,
        keep_last: int | None = None,
        keep_best: bool = False,
        keeper: Keeper | None = None,
    ) -> None:
        """token: the same on all ranks of a group of workers, and never used before. keep_last: None keeps all."""
        self._root, self._rank, self._world_size, self._token = root, rank, world_size, token
        self._asynchronous, self._keep_last, self._keep_best = asynchronous, keep_last, keep_best
        self._keeper = keeper
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        if rank == 0:
            for leftover in root.glob(".step-*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def save(self, pieces: "Mapping[str, Piece]", meta: CheckpointMeta, *, last: bool = False) -> None:
        """Writes a checkpoint, after the one before it is written.

        last: nothing changes the pieces any more, so they are written from where they are. Raises CheckpointError.
        """
        self.wait()
        shapes = {name: list(piece.shape) for name, piece in pieces.items()}
        tensors = {f"{name}@{piece.start}": piece.values.detach().flatten() for name, piece in pieces.items()}
        if self._asynchronous and not last:
            tensors = self._copied(tensors)
        else:
            self._buffers.clear()
        self._thread = threading.Thread(
            target=self._write, args=(tensors, shapes, meta), name="raylm-checkpoint", daemon=True
        )
        self._thread.start()
        if not self._asynchronous:
            self.wait()

    def check(self) -> None:
        """Raises the CheckpointError of a write that failed in the background."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Until what was given is written. Raises CheckpointError."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def close(self) -> None:
        """Until all is written and kept. Raises CheckpointError."""
        self.wait()
        if self._keeper is not None and self._rank == 0:
            self._keeper.close()

    def _copied(self, tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
        """In host memory that is used again by the next checkpoint."""
        import torch

        pinned = any(tensor.is_cuda for tensor in tensors.values())
        buffers = {}
        for key, tensor in tensors.items():
            buffer = self._buffers.get(key)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            buffers[key] = buffer.copy_(tensor, non_blocking=pinned)
        if pinned:
            torch.cuda.synchronize()
        self._buffers = buffers
        return buffers

    def _write(self, tensors: "dict[str, Tensor]", shapes: dict[str, list[int]], meta: CheckpointMeta) -> None:
        target = self._root / checkpoint_name(meta.step)
        scratch = self._root / f".{target.name}.{self._token}"
        try:
            self._write_own(scratch, tensors, shapes)
            if self._rank == 0:
                self._complete(scratch, target, meta)
                if self._keep_last is not None:
                    prune(self._root, keep_last=self._keep_last, keep_best=self._keep_best)
                if self._keeper is not None:
                    self._keeper.written(target)
        except Exception as error:
            self._error = error if isinstance(error, CheckpointError) else _unwritten(target, error)
            if self._rank == 0:
                shutil.rmtree(scratch, ignore_errors=True)

    def _write_own(self, scratch: Path, tensors: "dict[str, Tensor]", shapes: dict[str, list[int]]) -> None:
        """This rank's file and its note, by which rank 0 knows that the file is whole, or why it is not."""
        from safetensors.torch import save_file

        scratch.mkdir(parents=True, exist_ok=True)
        name = state_file(self._rank, self._world_size)
        try:
            save_file(_apart(tensors), scratch / name)
            flush(scratch / name)
            entry = {"bytes": (scratch / name).stat().st_size, "sha256": sha256_of(scratch / name)}
            note: dict[str, Any] = {"files": {name: entry}, "shapes": shapes}
        except Exception as error:
            note = {"error": str(error)}
            raise
        finally:
            partial = scratch / f".{name}.json"
            partial.write_text(json.dumps(note))
            partial.rename(scratch / f"{name}.json")

    def _complete(self, scratch: Path, target: Path, meta: CheckpointMeta) -> None:
        notes = {}
        until = time.monotonic() + OTHERS_S
        for rank in range(self._world_size):
            note = scratch / f"{state_file(rank, self._world_size)}.json"
            while not note.exists():
                if time.monotonic() > until:
                    raise OSError(f"rank {rank} has not written its part")
                time.sleep(_POLL_S)
            notes[rank] = json.loads(note.read_text())
            if "error" in notes[rank]:
                raise OSError(f"rank {rank}: {notes[rank]['error']}")
            note.unlink()
        whole = replace(
            meta,
            files={name: entry for note in notes.values() for name, entry in note["files"].items()},
            shapes={name: shape for note in notes.values() for name, shape in note["shapes"].items()},
        )
        (scratch / META_FILE).write_text(json.dumps(asdict(whole), indent=1))
        flush(scratch / META_FILE)
        flush(scratch)
        remove_checkpoint(target)
        scratch.rename(target)
        flush(self._root)


def _apart(tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """On the CPU, and copied where tensors share memory, as pieces of a flat one do: safetensors refuses those."""
    seen: set[int] = set()
    apart = {}
    for key, tensor in tensors.items():
        memory = tensor.untyped_storage()
        shared = memory.nbytes() != tensor.nbytes or memory.data_ptr() in seen
        seen.add(memory.data_ptr())
        apart[key] = tensor.clone() if shared and tensor.device.type == "cpu" else tensor.cpu()
    return apart


def _unwritten(target: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        str(target),
        f"cannot be written: {error}.",
        "The checkpoints before it are kept: make room and continue with training.resume=auto.",
    )


def flush(path: Path) -> None:
    """To the disk. A file that cannot be flushed is an error; some shared file systems cannot flush a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)
