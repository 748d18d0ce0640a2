"""Files wherever they lie: local paths, object storage, the web.

Compressed files (.gz, .zst, .bz2) are opened as what they hold.
"""

import fnmatch
import glob
import hashlib
import io
from pathlib import Path
from typing import IO, Any, cast

from raylm.data.remote import (
    ARROW_SCHEMES,
    BUFFER_BYTES,
    WEB_SCHEMES,
    as_os_error,
    as_raw,
    copy_of_web,
    inner_path,
    key_of,
    object_store,
    open_object,
    open_web,
    reason,
    scheme_of,
    shown,
    version_of,
    with_key,
)
from raylm.errors import DataError

HUB_SCHEME = "hf"
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
_SAMPLE_BYTES = 65536
_UNPACKED_BYTES = 2**20


def suffix_of(path: str) -> str:
    """The ending that says what a file holds, without that of its compression: `.jsonl` of `a/b.jsonl.gz?x=y`."""
    name = key_of(path) if scheme_of(path) in (*ARROW_SCHEMES, *WEB_SCHEMES) else path
    parts = [suffix.lower() for suffix in Path(name).suffixes]
    while parts and parts[-1] in COMPRESSIONS:
        parts.pop()
    return parts[-1] if parts else ""


def expand(path: str, endings: tuple[str, ...], setting: str) -> list[str]:
    """The files that a path names: itself, those of a folder (recursively, sorted, by ending), or those of a pattern.

    Hidden files are left out of folders. Raises DataError, which names the setting, when there is none.
    """
    scheme = scheme_of(path)
    if scheme in WEB_SCHEMES:
        return [path]
    if scheme in ARROW_SCHEMES:
        return _expand_remote(path, endings, setting)
    if scheme:
        raise DataError(path, f"addresses of kind {scheme}:// are not known.", f"Known: {_schemes()}.")
    return _expand_local(path, endings, setting)


def _schemes() -> str:
    return ", ".join(f"{name}://" for name in (HUB_SCHEME, *ARROW_SCHEMES, *WEB_SCHEMES))


def _wanted(relative: str, endings: tuple[str, ...]) -> bool:
    return suffix_of(relative) in endings and not any(part.startswith((".", "_")) for part in Path(relative).parts)


def _expand_local(path: str, endings: tuple[str, ...], setting: str) -> list[str]:
    local = Path(path).expanduser()
    if local.is_dir():
        found = sorted(
            file for file in local.rglob("*") if file.is_file() and _wanted(str(file.relative_to(local)), endings)
        )
        if not found:
            raise DataError(path, f"the folder holds no dataset files ({', '.join(endings)}).", "Check the path.")
        return [str(file.resolve()) for file in found]
    if local.is_file():
        return [str(local.resolve())]
    if any(sign in path for sign in "*?["):
        matches = sorted(name for name in glob.glob(str(local), recursive=True) if Path(name).is_file())
        if not matches:
            raise DataError(path, "the pattern matches no file.", f"Check {setting}.")
        return [str(Path(name).resolve()) for name in matches]
    raise DataError(path, "there is no such file or folder.", f"Check {setting}.")


def _expand_remote(path: str, endings: tuple[str, ...], setting: str) -> list[str]:
    from pyarrow import fs

    system, bucket = object_store(path)
    key = key_of(path).rstrip("/")
    pattern = any(sign in key for sign in "*[")
    fixed = key[: min(key.index(sign) for sign in "*[" if sign in key)].rpartition("/")[0] if pattern else key
    root = bucket.rstrip("/")
    inner = f"{root}/{fixed}".rstrip("/")
    try:
        with as_os_error():
            if not pattern and system.get_file_info(inner).type == fs.FileType.File:
                return [path]
            entries = system.get_file_info(fs.FileSelector(inner, recursive=True, allow_not_found=True))
    except OSError as error:
        raise DataError(shown(path), f"cannot be listed: {error}.", "Check the address and credentials.") from None
    if not entries:
        raise DataError(shown(path), "there is no such object, folder or bucket.", f"Check {setting}.")
    names = sorted(entry.path[len(root) + 1 :] for entry in entries if entry.type == fs.FileType.File)
    if pattern:
        names = [name for name in names if _matches(name.split("/"), key.split("/"))]
        if not names:
            raise DataError(shown(path), "the pattern matches no object.", f"Check {setting}.")
    else:
        names = [name for name in names if _wanted(name[len(fixed) :].lstrip("/"), endings)]
        if not names:
            raise DataError(
                shown(path), f"the folder holds no dataset files ({', '.join(endings)}).", "Check the path."
            )
    return [with_key(path, name) for name in names]


def _matches(name: list[str], pattern: list[str]) -> bool:
    """As glob does in folders: `*` stays within a folder and finds no hidden file, `**` is any number of folders."""
    if not pattern:
        return not name
    if pattern[0] == "**":
        return _matches(name, pattern[1:]) or (
            bool(name) and not name[0].startswith(".") and _matches(name[1:], pattern)
        )
    if not name or (name[0].startswith(".") and not pattern[0].startswith(".")):
        return False
    return fnmatch.fnmatchcase(name[0], pattern[0]) and _matches(name[1:], pattern[1:])


def open_bytes(path: str) -> io.BufferedReader:
    """A file as a stream of its uncompressed bytes. Raises OSError and DataError."""
    import pyarrow as pa

    stream: Any = _open_raw(path)
    compression = COMPRESSIONS.get(Path(key_of(path) if scheme_of(path) else path).suffix.lower())
    if compression:
        stream = as_raw(pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), compression))
        return io.BufferedReader(stream, _UNPACKED_BYTES)
    return cast(io.BufferedReader, stream)


def _open_raw(path: str) -> IO[bytes]:
    """A file as a stream of its bytes as they are."""
    if not scheme_of(path):
        return open(path, "rb")
    stream = open_web(path) if scheme_of(path) in WEB_SCHEMES else open_object(path)
    return io.BufferedReader(stream, BUFFER_BYTES)


def open_random_access(path: str) -> Any:
    """A file whose parts are read in any order, as Parquet wants it. Raises OSError and DataError."""
    import pyarrow as pa

    scheme = scheme_of(path)
    if scheme in WEB_SCHEMES:
        return copy_of_web(path)
    if scheme in ARROW_SCHEMES:
        system, inner = inner_path(path)
        with as_os_error():
            return system.open_input_file(inner)
    return pa.OSFile(path, "rb")


def check_readable(path: str) -> None:
    """Raises DataError for a file that cannot be opened."""
    if scheme_of(path) == HUB_SCHEME:
        return
    try:
        if scheme_of(path):
            (open_web if scheme_of(path) in WEB_SCHEMES else open_object)(path).close()
            return
        with open_bytes(path) as stream:
            stream.read(1)
    except OSError as error:
        why = error.strerror or reason(error)
        raise DataError(shown(path), f"cannot be read: {why}.", "Check the path and its permissions.") from None


def num_bytes(path: str) -> int | None:
    """The size of a local file, None elsewhere and for compressed ones, whose contents are larger."""
    if scheme_of(path) or Path(path).suffix.lower() in (*COMPRESSIONS, ".parquet"):
        return None
    return Path(path).stat().st_size


def fingerprint(path: str) -> str:
    """What changes when a file does: its size, its time of change, and a digest of its beginning and end, or what its
    server says of it; empty when that is nothing. Raises DataError."""
    if scheme_of(path):
        try:
            return version_of(path)
        except OSError as error:
            raise DataError(shown(path), f"cannot be read: {error}.", "Check the address.") from None
    status = Path(path).stat()
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        digest.update(file.read(_SAMPLE_BYTES))
        if status.st_size > _SAMPLE_BYTES:
            file.seek(max(_SAMPLE_BYTES, status.st_size - _SAMPLE_BYTES))
            digest.update(file.read(_SAMPLE_BYTES))
    return f"{status.st_size}:{status.st_mtime_ns}:{digest.hexdigest()}"
