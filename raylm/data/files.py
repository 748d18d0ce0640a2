"""Files wherever they lie: local paths, s3://, gs://, abfs:// through Arrow's file systems, http(s):// through fsspec.

Compressed files (.gz, .zst, .bz2) are opened as what they hold.
"""

import fnmatch
import glob
import hashlib
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import urlsplit

from raylm.errors import DataError

ARROW_SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs")
WEB_SCHEMES = ("http", "https")
HUB_SCHEME = "hf"
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
_SAMPLE_BYTES = 65536


def scheme_of(path: str) -> str:
    """`s3`, `https`, `hf`, … of an address; empty for a local path."""
    scheme, found, _ = path.partition("://")
    return scheme.lower() if found else ""


def suffix_of(path: str) -> str:
    """The ending that says what a file holds, without that of its compression: `.jsonl` of `a/b.jsonl.gz?x=y`."""
    name = urlsplit(path).path if scheme_of(path) else path
    parts = [suffix.lower() for suffix in Path(name).suffixes]
    while parts and parts[-1] in COMPRESSIONS:
        parts.pop()
    return parts[-1] if parts else ""


def expand(path: str, endings: tuple[str, ...]) -> list[str]:
    """The files that a path names: itself, those of a folder (recursively, sorted, by ending), or those of a pattern.

    Hidden files are left out of folders. Raises DataError when there is none.
    """
    scheme = scheme_of(path)
    if scheme in WEB_SCHEMES:
        return [path]
    if scheme in ARROW_SCHEMES:
        return _expand_remote(path, endings)
    if scheme:
        raise DataError(path, f"addresses of kind {scheme}:// are not known.", f"Known: {_schemes()}.")
    return _expand_local(path, endings)


def _schemes() -> str:
    return ", ".join(f"{name}://" for name in (HUB_SCHEME, *ARROW_SCHEMES, *WEB_SCHEMES))


def _wanted(relative: str, endings: tuple[str, ...]) -> bool:
    return suffix_of(relative) in endings and not any(part.startswith((".", "_")) for part in Path(relative).parts)


def _expand_local(path: str, endings: tuple[str, ...]) -> list[str]:
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
            raise DataError(path, "the pattern matches no file.", "Check data.train and data.eval.")
        return [str(Path(name).resolve()) for name in matches]
    raise DataError(path, "there is no such file or folder.", "Check data.train and data.eval.")


def _expand_remote(path: str, endings: tuple[str, ...]) -> list[str]:
    from pyarrow import fs

    base, question, query = path.partition("?")
    pattern = any(sign in base for sign in "*[")
    root = base[: min(base.index(sign) for sign in "*[" if sign in base)].rpartition("/")[0] if pattern else base
    system, inner = _arrow_system(root + question + query, path)
    try:
        info = system.get_file_info(inner)
        if info.type == fs.FileType.File:
            return [path]
        entries = system.get_file_info(fs.FileSelector(inner, recursive=True, allow_not_found=True))
    except OSError as error:
        raise DataError(path, f"cannot be listed: {_first_line(error)}", "Check the address and credentials.") from None
    names = sorted(entry.path for entry in entries if entry.type == fs.FileType.File)
    if pattern:
        wanted = urlsplit(base).netloc + urlsplit(base).path
        names = [name for name in names if fnmatch.fnmatch(name, wanted)]
    else:
        names = [name for name in names if _wanted(name[len(inner) :].lstrip("/"), endings)]
    if not names:
        raise DataError(path, "holds no dataset files.", "Check the address.")
    return [f"{scheme_of(path)}://{name}{question}{query}" for name in names]


def _arrow_system(path: str, shown: str) -> tuple[Any, str]:
    from pyarrow import fs

    try:
        system, inner = fs.FileSystem.from_uri(path)
    except (OSError, ValueError) as error:
        raise DataError(shown, f"cannot be reached: {_first_line(error)}", "Check the address.") from None
    return system, inner


def open_bytes(path: str) -> IO[bytes]:
    """A file as a stream of its uncompressed bytes. Raises OSError."""
    import pyarrow as pa

    scheme = scheme_of(path)
    name = urlsplit(path).path if scheme else path
    compression = COMPRESSIONS.get(Path(name).suffix.lower())
    if not scheme and not compression:
        return open(path, "rb")
    if scheme in WEB_SCHEMES:
        import fsspec

        stream: Any = fsspec.open(path, "rb").open()
        stream = pa.PythonFile(stream, mode="r") if compression else stream
    elif scheme in ARROW_SCHEMES:
        system, inner = _arrow_system(path, path)
        stream = system.open_input_stream(inner, compression=None)
    else:
        stream = pa.OSFile(path, "rb")
    if compression:
        stream = pa.CompressedInputStream(stream, compression)
    return cast(IO[bytes], stream)


def open_random_access(path: str) -> Any:
    """A file whose parts are read in any order, as Parquet wants it. Raises OSError."""
    import pyarrow as pa

    scheme = scheme_of(path)
    if scheme in WEB_SCHEMES:
        import fsspec

        return fsspec.open(path, "rb").open()
    if scheme in ARROW_SCHEMES:
        system, inner = _arrow_system(path, path)
        return system.open_input_file(inner)
    return pa.OSFile(path, "rb")


def check_readable(path: str) -> None:
    """Raises DataError for a file that cannot be opened."""
    if scheme_of(path) == HUB_SCHEME:
        return
    try:
        with open_bytes(path) as stream:
            stream.read(1)
    except (OSError, FileNotFoundError) as error:
        reason = getattr(error, "strerror", None) or _first_line(error)
        raise DataError(path, f"cannot be read: {reason}.", "Check the path and its permissions.") from None


def num_bytes(path: str) -> int | None:
    """The size of a local file, None elsewhere and for compressed ones, whose contents are larger."""
    if scheme_of(path) or Path(path).suffix.lower() in (*COMPRESSIONS, ".parquet"):
        return None
    return Path(path).stat().st_size


def fingerprint(path: str) -> str:
    """What changes when a file does: its size, its time of change, and a digest of its beginning and end."""
    scheme = scheme_of(path)
    if scheme in ARROW_SCHEMES:
        system, inner = _arrow_system(path, path)
        info = system.get_file_info(inner)
        return f"{info.size}:{info.mtime_ns}"
    if scheme in WEB_SCHEMES:
        import fsspec

        system = fsspec.filesystem(scheme)
        info = system.info(path)
        return f"{info.get('size')}:{info.get('ETag') or info.get('mtime') or ''}"
    if scheme:
        return path
    status = Path(path).stat()
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        digest.update(file.read(_SAMPLE_BYTES))
        if status.st_size > _SAMPLE_BYTES:
            file.seek(max(_SAMPLE_BYTES, status.st_size - _SAMPLE_BYTES))
            digest.update(file.read(_SAMPLE_BYTES))
    return f"{status.st_size}:{status.st_mtime_ns}:{digest.hexdigest()}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
