"""A second place for checkpoints: a folder, or object storage. Complete or absent there too.

The description of a checkpoint is written last and deleted first. The mirror holds the checkpoints that the run
directory holds.
"""

import logging
import shutil
import time
from pathlib import Path
from typing import Any

from raylm.data.remote import inner_path, scheme_of, shown
from raylm.errors import CheckpointError, RaylmError
from raylm.training.checkpoint import META_FILE, list_checkpoints, open_state, read_meta, remove_checkpoint

logger = logging.getLogger(__name__)

ATTEMPTS = 3
_COPY_BYTES = 8 * 2**20


def mirror_of(address: str | None) -> "Mirror | None":
    """The mirror of a setting."""
    return Mirror(address) if address else None


class Mirror:
    """Copies each new checkpoint. A copy that fails is tried again with the next one, and for the last time at the end
    of the run: a storage that is away for a while does not stop the training."""

    def __init__(self, address: str) -> None:
        """address: of the folder that the checkpoints of this run lie in."""
        self._address = address
        self._newest: Path | None = None
        self._problem = ""

    def written(self, path: Path) -> None:
        """See Keeper."""
        self._newest, self._problem = path, ""
        try:
            self._copy_all(path.parent)
        except (OSError, RaylmError) as error:
            self._problem = str(error)
            logger.warning("%s is not in %s yet: %s", path.name, shown(self._address), error)

    def close(self) -> None:
        """See Keeper."""
        if self._newest is not None and self._problem:
            self.written(self._newest)
        if self._problem:
            raise CheckpointError(
                shown(self._address),
                f"does not hold the newest checkpoint: {self._problem}.",
                f"It lies in {self._newest}.",
            )

    def _copy_all(self, root: Path) -> None:
        for attempt in range(ATTEMPTS):
            try:
                system, base = _place(self._address)
                there, here = _complete(system, base), list_checkpoints(root)
                for path in here:
                    if path.name not in there:
                        _upload(system, f"{base}/{path.name}", path)
                for name in there - {path.name for path in here}:
                    _delete(system, f"{base}/{name}")
                return
            except OSError:
                if attempt + 1 == ATTEMPTS:
                    raise
                time.sleep(2**attempt)


def newest_in_mirror(address: str) -> str | None:
    """The address of the newest complete checkpoint of a mirror, or None. Raises CheckpointError."""
    try:
        system, base = _place(address)
        names = sorted(_complete(system, base))
    except OSError as error:
        raise CheckpointError(shown(address), f"cannot be read: {error}.", "Check checkpoint.mirror.") from None
    return joined(address, names[-1]) if names else None


def fetch(address: str, root: Path) -> Path:
    """Copies a checkpoint from a mirror to `root`, verified, complete or absent. Raises CheckpointError."""
    from pyarrow import fs

    name = address.partition("?")[0].rstrip("/").rpartition("/")[2]
    target, scratch = root / name, root / f".{name}.fetched"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        system, base = _place(address)
        if system.get_file_info(f"{base}/{META_FILE}").type != fs.FileType.File:
            raise CheckpointError(shown(address), "is not a complete checkpoint.", "Choose another one.")
        scratch.mkdir(parents=True)
        for info in system.get_file_info(fs.FileSelector(base)):
            if info.type == fs.FileType.File:
                with system.open_input_stream(info.path) as source, (scratch / info.base_name).open("wb") as copy:
                    shutil.copyfileobj(source, copy, _COPY_BYTES)
        open_state(scratch, read_meta(scratch))
        remove_checkpoint(target)
        scratch.rename(target)
    except OSError as error:
        raise CheckpointError(shown(address), f"cannot be copied to {root}: {error}.") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _place(address: str) -> tuple[Any, str]:
    from pyarrow import fs

    if scheme_of(address):
        return inner_path(address)
    return fs.LocalFileSystem(), str(Path(address).expanduser().absolute())


def joined(address: str, name: str) -> str:
    """The address of something in a folder, with the options that may stand behind the folder's."""
    path, question, options = address.partition("?")
    return f"{path.rstrip('/')}/{name}{question}{options}"


def _complete(system: Any, base: str) -> set[str]:
    """Names of the complete checkpoints in a folder; deeper ones are another run's."""
    from pyarrow import fs

    found = system.get_file_info(fs.FileSelector(base, recursive=True, allow_not_found=True))
    paths = [info.path.rsplit("/", 2) for info in found if info.base_name == META_FILE]
    return {folder for parent, folder, _ in paths if folder.startswith("step-") and parent == base.rstrip("/")}


def _upload(system: Any, target: str, path: Path) -> None:
    system.create_dir(target, recursive=True)
    files = sorted(path.iterdir(), key=lambda file: (file.name == META_FILE, file.name))
    for file in files:
        with file.open("rb") as source, system.open_output_stream(f"{target}/{file.name}") as copy:
            shutil.copyfileobj(source, copy, _COPY_BYTES)


def _delete(system: Any, target: str) -> None:
    system.delete_file(f"{target}/{META_FILE}")
    system.delete_dir(target)
