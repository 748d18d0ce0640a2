"""Object storage through Arrow's file systems and the web through fsspec: opened without long waits, faults as OSError.

Credentials come from the environment, never from an address: addresses stand in logs, caches and run directories. A
key is taken as it is written, without percent-decoding, and `?` starts the options (`endpoint_override`, `scheme`,
`region` for s3).
"""

import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, NoReturn
from urllib.parse import parse_qsl, urlsplit

from raylm.errors import DataError

ARROW_SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs")
WEB_SCHEMES = ("http", "https")
BUFFER_BYTES = 8 * 2**20
"""Object storage answers a request for each buffer."""
_ATTEMPTS = 3
_CONNECT_S = 5
_ANSWER_S = 10
_WEB_SILENCE_S = 60
_GOOGLE_RETRIES_S = 30
_S3_OPTIONS = ("endpoint_override", "region", "scheme")


def scheme_of(path: str) -> str:
    """`s3`, `https`, `hf`, … of an address; empty for a local path."""
    scheme, found, _ = path.partition("://")
    return scheme.lower() if found else ""


def shown(path: str) -> str:
    """A path or address as messages name it: what follows `?` may be a signature, what precedes `@` a password."""
    scheme = scheme_of(path)
    if scheme not in (*ARROW_SCHEMES, *WEB_SCHEMES):
        return path
    bucket, key, _ = _parts(path)
    secret, at, host = bucket.rpartition("@")
    return f"{scheme}://{secret.partition(':')[0]}{at}{host}/{key}".rstrip("/")


def check_address(path: str) -> None:
    """Raises DataError for an address with a password in it."""
    if ":" in _parts(path)[0].rpartition("@")[0]:
        raise DataError(
            shown(path),
            "holds a password, which would stand in logs and run directories.",
            "Leave it out: credentials come from the environment (docs/data.md).",
        )


def key_of(path: str) -> str:
    """What follows the bucket or host of an address, without its options."""
    return _parts(path)[1]


def _parts(path: str) -> tuple[str, str, str]:
    """Bucket or host, key, options."""
    rest, _, options = path.partition("://")[2].partition("?")
    bucket, _, key = rest.partition("/")
    return bucket, key, options


def with_key(path: str, key: str) -> str:
    """The address of another key in the same bucket, with the same options."""
    bucket, _, options = _parts(path)
    return f"{scheme_of(path)}://{bucket}/{key}" + (f"?{options}" if options else "")


def object_store(path: str) -> tuple[Any, str]:
    """The Arrow file system of an address, and the bucket as it names it. Raises DataError."""
    bucket, _, options = _parts(path)
    check_address(path)
    try:
        if scheme_of(path) == "s3":
            return _s3(bucket, options, os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"))
        return _arrow(scheme_of(path), bucket, options)
    except (OSError, ValueError, NotImplementedError) as error:  # the last: Arrow was built without this file system
        raise DataError(shown(path), f"cannot be reached: {reason(error)}.", "Check the address.") from None


def inner_path(path: str) -> tuple[Any, str]:
    """The Arrow file system of an address, and the path of its key in there. Raises DataError."""
    system, root = object_store(path)
    return system, f"{root.rstrip('/')}/{key_of(path)}".rstrip("/")


def _s3(bucket: str, options: str, endpoint: str | None) -> tuple[Any, str]:
    from pyarrow import fs

    given = dict(parse_qsl(options))
    unknown = [name for name in given if name not in _S3_OPTIONS]
    if unknown:
        raise ValueError(f"option {unknown[0]} is unknown; known: {', '.join(_S3_OPTIONS)}")
    if endpoint and "endpoint_override" not in given:
        parts = urlsplit(endpoint)
        given = {"endpoint_override": parts.netloc or endpoint, "scheme": parts.scheme or "https", **given}
    if "endpoint_override" not in given and "region" not in given:
        given["region"] = fs.resolve_s3_region(bucket)
    system = fs.S3FileSystem(
        **given,
        connect_timeout=_CONNECT_S,
        request_timeout=_ANSWER_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
    )
    return system, bucket


def _arrow(scheme: str, bucket: str, options: str) -> tuple[Any, str]:
    from pyarrow import fs

    if scheme in ("gs", "gcs") and "retry_limit_seconds" not in options:  # else 15 minutes
        options = "&".join(filter(None, (options, f"retry_limit_seconds={_GOOGLE_RETRIES_S}")))
    return fs.FileSystem.from_uri(f"{scheme}://{bucket}" + (f"?{options}" if options else ""))


def open_object(path: str) -> io.RawIOBase:
    """An object from its beginning, unbuffered. Raises OSError and DataError."""
    system, inner = inner_path(path)
    with as_os_error():
        return as_raw(system.open_input_stream(inner, compression=None))


def open_web(path: str) -> io.RawIOBase:
    """A file of a web server from its beginning, in one request. Raises OSError and DataError."""
    check_address(path)
    with as_os_error():
        return as_raw(_web(path).open(path, "rb", block_size=0))


def copy_of_web(path: str) -> IO[bytes]:
    """A file of a web server, copied into the temporary folder: not every server sends parts. Raises OSError."""
    import shutil

    copy = tempfile.TemporaryFile()  # noqa: SIM115  (the reader closes it)
    with open_web(path) as stream:
        shutil.copyfileobj(stream, copy, BUFFER_BYTES)
    copy.seek(0)
    return copy


def version_of(path: str) -> str:
    """What changes when an object or a file of a web server does; empty when the server tells nothing of the kind.

    Raises OSError and DataError.
    """
    if scheme_of(path) in WEB_SCHEMES:
        with as_os_error():
            info = _web(path).info(path)
        marks = [str(info[name]) for name in ("ETag", "Last-Modified", "Content-MD5", "Digest") if info.get(name)]
        return ":".join([str(info.get("size")), *marks]) if marks else ""
    system, inner = inner_path(path)
    with as_os_error():
        info = system.get_file_info(inner)
        # The time of change has whole seconds there; the etag tells two writes within one apart.
        metadata = system.open_input_stream(inner, compression=None).metadata() or {}
    etag = next((value.decode() for name, value in metadata.items() if _name(name) == "etag"), "")
    return f"{info.size}:{info.mtime_ns}:{etag}"


def _name(key: str | bytes) -> str:
    return (key.decode() if isinstance(key, bytes) else key).lower()


def _web(path: str) -> Any:
    import fsspec
    from aiohttp import ClientTimeout

    # aiohttp gives a whole file five minutes. A .gz that is declared as such would be unpacked on the way, and again.
    waits = ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_WEB_SILENCE_S)
    packed = key_of(path).lower().endswith((".gz", ".zst", ".bz2"))
    return fsspec.filesystem(scheme_of(path), client_kwargs={"timeout": waits, "auto_decompress": not packed})


def as_raw(inner: Any) -> io.RawIOBase:
    """Something with `read` as a raw stream, so that Python's buffering works on it. Its faults become OSErrors."""
    return _Stream(inner)


class _Stream(io.RawIOBase):
    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with as_os_error():
            data = self._inner.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._inner.close()
        super().close()


@contextmanager
def as_os_error() -> Iterator[None]:
    """Turns what the libraries raise for a storage or server that does not do its part into OSError."""
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError as error:  # fsspec's name for whatever a server answers
        if error.__cause__ is None:
            raise FileNotFoundError("there is no such file") from None
        _raise_web(error.__cause__)
    except (OSError, pa.ArrowException) as error:
        raise OSError(reason(error)) from None
    except Exception as error:
        _raise_web(error)


def _raise_web(error: BaseException) -> NoReturn:
    """aiohttp's errors are no OSErrors, and name the whole address."""
    from aiohttp import ClientError, ClientPayloadError, ClientResponseError

    if isinstance(error, OSError):
        raise OSError(reason(error)) from None
    if isinstance(error, ClientResponseError):
        raise OSError(f"the server answers {error.status} {error.message}") from None
    if isinstance(error, ClientPayloadError):
        raise OSError("the server ended its answer in the middle of the file") from None
    if isinstance(error, ClientError):
        raise OSError(type(error).__name__) from None
    raise error


def reason(error: BaseException) -> str:
    """The first line of an error, without the full stop."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
