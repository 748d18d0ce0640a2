"""Where adapters lie: a folder or a bucket with one folder an adapter, or one adapter alone.

A client's word becomes a path in one place, `AdapterRoot.files`: only a single plain path component gets there, and a
link is followed only inside the root.
"""

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from raylm.data.remote import (
    ARROW_SCHEMES,
    BUFFER_BYTES,
    as_os_error,
    inner_path,
    key_of,
    open_object,
    scheme_of,
    shown,
    version_of,
    with_key,
)
from raylm.errors import DataError, ModelError, ServingError
from raylm.models.adapter_files import CONFIG_FILE, PICKLE_FILES, WEIGHTS_FILE

ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
LOCAL_FRESH_S = 1.0
REMOTE_FRESH_S = 5.0
_BAD_NAME = "has a name that is not letters, digits and . _ - (128 at most)"
_LINK_OUT = "is a link that leads out of the root"


PICKLED = "pickled"
"""The fingerprint of an adapter whose weights are there in pickle format only."""


class AdapterFiles(Protocol):
    """The two files of one adapter.

    Methods raise OSError where the storage does not answer, and ModelError for a link that leads out of the root.
    """

    def fingerprint(self) -> str | None:
        """What changes when a file does; PICKLED, or None when there is no adapter."""
        ...

    def open(self, file: str) -> BinaryIO:
        """A file from its beginning."""
        ...

    def num_bytes(self, file: str) -> int:
        """A file's length."""
        ...


class AdapterRoot(Protocol):
    """The adapters there are, by name."""

    fresh_s: float
    """Seconds for which what the storage said is taken as true."""
    remote: bool
    """Whether each question is a request over a network."""

    def names(self) -> Sequence[str]:
        """Names that may be asked for, sorted. Raises OSError."""
        ...

    def ignored(self) -> Sequence[tuple[str, str]]:
        """Folders that cannot be asked for, each with the reason. Raises OSError."""
        ...

    def files(self, name: str) -> AdapterFiles | None:
        """The files of an adapter; None for a word that is no name. Says nothing about whether they are there."""
        ...


def open_root(address: str) -> AdapterRoot:
    """The adapters below a folder or an address of object storage. Raises ServingError when there is no such root."""
    if scheme_of(address):
        root: AdapterRoot = RemoteRoot(address)
    else:
        root = LocalRoot(Path(address).expanduser())
    try:
        root.names()
    except (OSError, DataError) as error:
        raise ServingError(
            f"adapters {shown(address)}", f"cannot be listed: {error}.", "Give the folder that holds adapter folders."
        ) from None
    return root


def open_single(address: str) -> AdapterRoot:
    """One adapter, under the last part of its path. Raises ServingError for a name that clients could not ask for."""
    parts = key_of(address) if scheme_of(address) else str(Path(address).expanduser().absolute())
    name = parts.rstrip("/").rpartition("/")[2]
    if not ADAPTER_NAME.fullmatch(name):
        raise ServingError(
            f"adapter {shown(address)}",
            "its folder's name must be letters, digits and . _ -, for clients ask for it.",
            "Rename the folder.",
        )
    if scheme_of(address):
        _check_scheme(address)
        return SingleAdapter(name, RemoteFiles(address), remote=True)
    return SingleAdapter(name, LocalFiles(Path(address).expanduser().absolute(), None), remote=False)


class SingleAdapter:
    """A root of one adapter."""

    def __init__(self, name: str, files: AdapterFiles, *, remote: bool) -> None:
        self._name, self._files = name, files
        self.remote, self.fresh_s = remote, REMOTE_FRESH_S if remote else LOCAL_FRESH_S

    def names(self) -> Sequence[str]:
        return (self._name,)

    def ignored(self) -> Sequence[tuple[str, str]]:
        return ()

    def files(self, name: str) -> AdapterFiles | None:
        return self._files if name == self._name else None


class LocalRoot:
    """A folder of adapter folders."""

    fresh_s, remote = LOCAL_FRESH_S, False

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()

    def names(self) -> Sequence[str]:
        return [name for name, reason in self._folders() if not reason]

    def ignored(self) -> Sequence[tuple[str, str]]:
        return [(name, reason) for name, reason in self._folders() if reason and not name.startswith(".")]

    def files(self, name: str) -> AdapterFiles | None:
        return LocalFiles(self._folder / name, self._folder.resolve()) if ADAPTER_NAME.fullmatch(name) else None

    def _folders(self) -> list[tuple[str, str]]:
        """Folders with an adapter, and why one cannot be asked for."""
        root = self._folder.resolve()
        found = []
        for entry in os.scandir(self._folder):
            config = Path(entry.path) / CONFIG_FILE
            if config.is_file():
                inside = config.resolve().is_relative_to(root)
                reason = "" if ADAPTER_NAME.fullmatch(entry.name) else _BAD_NAME
                found.append((entry.name, reason if inside else _LINK_OUT))
        return sorted(found)


class LocalFiles:
    """One adapter folder; with `inside`, all of its files must lie in there, links resolved."""

    def __init__(self, folder: Path, inside: Path | None) -> None:
        self._folder, self._inside = folder, inside

    def fingerprint(self) -> str | None:
        config = self._mark(CONFIG_FILE)
        weights = self._mark(WEIGHTS_FILE)
        if config and weights:
            return f"{config} {weights}"
        return PICKLED if config and any((self._folder / file).exists() for file in PICKLE_FILES) else None

    def open(self, file: str) -> BinaryIO:
        return self._resolved(file).open("rb")

    def num_bytes(self, file: str) -> int:
        return self._resolved(file).stat().st_size

    def _mark(self, file: str) -> str:
        path = self._resolved(file)
        if not path.is_file():
            return ""
        stat = path.stat()
        return f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"

    def _resolved(self, file: str) -> Path:
        path = (self._folder / file).resolve()
        if self._inside is not None and not path.is_relative_to(self._inside):
            raise ModelError(f"adapter {self._folder.name}", f"{file} {_LINK_OUT}.", "Copy the file there.")
        return path


class RemoteRoot:
    """A bucket, or a folder in it, of adapter folders; read through Arrow."""

    fresh_s, remote = REMOTE_FRESH_S, True

    def __init__(self, address: str) -> None:
        _check_scheme(address)
        self._address, self._key = address, key_of(address).strip("/")

    def names(self) -> Sequence[str]:
        return [name for name in self._folders() if ADAPTER_NAME.fullmatch(name)]

    def ignored(self) -> Sequence[tuple[str, str]]:
        return [(name, _BAD_NAME) for name in self._folders() if not ADAPTER_NAME.fullmatch(name)]

    def files(self, name: str) -> AdapterFiles | None:
        return RemoteFiles(self._of(name)) if ADAPTER_NAME.fullmatch(name) else None

    def _of(self, name: str) -> str:
        return with_key(self._address, f"{self._key}/{name}".lstrip("/"))

    def _folders(self) -> list[str]:
        from pyarrow import fs

        system, inner = inner_path(self._address)
        with as_os_error():
            entries = system.get_file_info(fs.FileSelector(inner))
        return sorted(entry.base_name for entry in entries if entry.type == fs.FileType.Directory)


class RemoteFiles:
    """One adapter folder in object storage."""

    def __init__(self, address: str) -> None:
        self._address = address

    def fingerprint(self) -> str | None:
        if not self._there(CONFIG_FILE):
            return None
        if not self._there(WEIGHTS_FILE):
            return PICKLED if any(self._there(file) for file in PICKLE_FILES) else None
        return " ".join(version_of(self._of(file)) for file in (CONFIG_FILE, WEIGHTS_FILE))

    def open(self, file: str) -> BinaryIO:
        return io.BufferedReader(open_object(self._of(file)), BUFFER_BYTES)

    def _of(self, file: str) -> str:
        return with_key(self._address, f"{key_of(self._address).rstrip('/')}/{file}".lstrip("/"))

    def num_bytes(self, file: str) -> int:
        return int(self._info(file).size)

    def _there(self, file: str) -> bool:
        from pyarrow import fs

        return bool(self._info(file).type == fs.FileType.File)

    def _info(self, file: str) -> Any:
        system, inner = inner_path(self._of(file))
        with as_os_error():
            return system.get_file_info(inner)


def _check_scheme(address: str) -> None:
    if scheme_of(address) not in ARROW_SCHEMES:
        raise ServingError(
            shown(address),
            "adapters are read from folders and object storage.",
            f"Give a folder, or an address of {', '.join(ARROW_SCHEMES)}.",
        )
