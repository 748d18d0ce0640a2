"""Tokenised rows kept for the next run, under an address made of everything they depend on.

An entry is a folder of Parquet shards with a manifest that names each with its size and digest. The manifest is
written last and at once (renamed, or put by the object store), so an entry is complete or absent; shards carry names
of their own, so two runs that fill the same entry do not meet. A shard that is not what the manifest says makes the
entry be built anew.
"""

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from raylm.data.remote import ARROW_SCHEMES, as_os_error, inner_path, reason, scheme_of, shown
from raylm.errors import DataError

logger = logging.getLogger(__name__)

STAGE_VERSION = 1
"""Raised with every change of what the tokenising stage makes of a row."""
MANIFEST = "manifest.json"
DEFAULT_FOLDER = "~/.cache/raylm/data"
FOLDER_VARIABLE = "RAYLM_DATA_CACHE"
"""Names another default folder."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of an entry. digest: SHA-256 of its bytes."""

    name: str
    num_bytes: int
    digest: str


def address(parts: Mapping[str, Any]) -> str:
    """The name of an entry; parts: everything its rows depend on, as JSON values."""
    text = json.dumps({"stage": STAGE_VERSION, **parts}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


class Cache:
    """Entries in a folder of a local or shared file system, or at an address such as s3://bucket/prefix."""

    def __init__(self, root: str, key: str) -> None:
        """Raises DataError when the folder cannot be made."""
        self._open(root, key)
        try:
            with as_os_error():
                self._system.create_dir(self._folder, recursive=True)
        except OSError as error:
            raise DataError(
                shown(root), f"cannot hold the cache: {error}.", "Set data.cache to another folder, or off."
            ) from None

    def _open(self, root: str, key: str) -> None:
        self._root, self._key = root, key
        self._system, folder = _system_of(root)
        self._folder = f"{folder.rstrip('/')}/{key}"

    def __reduce__(self) -> Any:
        """A worker opens the file system itself: what Arrow would send along may hold credentials."""
        return _reopen, (self._root, self._key)

    @property
    def where(self) -> str:
        """The entry, as messages name it."""
        return f"{shown(self._root).rstrip('/')}/{self._key}"

    def shards(self) -> list[Shard] | None:
        """The shards of a complete entry whose files have their sizes, else None."""
        try:
            with self._system.open_input_stream(f"{self._folder}/{MANIFEST}") as stream:
                tree = json.loads(stream.read())
            shards = [Shard(**shard) for shard in tree["shards"]]
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("%s: the manifest cannot be read (%s): tokenising again", self.where, reason(error))
            return None
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s: the manifest is damaged (%s): tokenising again", self.where, type(error).__name__)
            return None
        infos = self._system.get_file_info([f"{self._folder}/{shard.name}" for shard in shards])
        wrong = [shard.name for shard, info in zip(shards, infos, strict=True) if info.size != shard.num_bytes]
        if wrong:
            logger.warning("%s: shard %s is missing or damaged: tokenising again", self.where, wrong[0])
            return None
        return shards

    def columns(self, shard: Shard, names: list[str]) -> pa.Table:
        """Some columns of a shard, whose bytes are not held against its digest. Raises OSError."""
        import pyarrow.parquet as pq

        return pq.read_table(f"{self._folder}/{shard.name}", columns=names, filesystem=self._system)

    def write_shard(self, table: pa.Table) -> Shard:
        """Stores a table. Raises OSError, such as for a full disk."""
        import pyarrow.parquet as pq

        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", use_dictionary=["reason", "problem"])
        data = sink.getvalue()
        name = f"{uuid.uuid4().hex}.parquet"
        with self._system.open_output_stream(f"{self._folder}/{name}") as stream:
            stream.write(data)
        return Shard(name, data.size, hashlib.sha256(data).hexdigest())

    def read_shard(self, shard: Shard) -> pa.Table | None:
        """The table of a shard, or None when the file is not what was written."""
        import pyarrow.parquet as pq

        try:
            with self._system.open_input_stream(f"{self._folder}/{shard.name}") as stream:
                data = stream.read()
        except OSError:
            return None
        if hashlib.sha256(data).hexdigest() != shard.digest:
            return None
        return pq.read_table(pa.BufferReader(data))

    def commit(self, shards: list[Shard]) -> None:
        """Makes the entry complete, and removes the shards of a former manifest."""
        former = {shard.name for shard in self.shards() or ()}
        tree = {"shards": [{"name": s.name, "num_bytes": s.num_bytes, "digest": s.digest} for s in shards]}
        target = f"{self._folder}/{MANIFEST}"
        scratch = f"{target}.{uuid.uuid4().hex}"
        if scheme_of(self._root):
            scratch = target  # object stores put a file at once
        with self._system.open_output_stream(scratch) as stream:
            stream.write(json.dumps(tree).encode())
        if scratch != target:
            self._system.move(scratch, target)
        for name in former - {shard.name for shard in shards}:
            with suppress(FileNotFoundError):  # another run that filled the entry was first
                self._system.delete_file(f"{self._folder}/{name}")


def cache_root(setting: bool | str, *, num_nodes: int) -> str | None:
    """The folder of the cache, or None for none. A local default serves one node only."""
    if setting is False:
        return None
    if isinstance(setting, str):
        return setting if scheme_of(setting) else str(Path(setting).expanduser().resolve())
    if num_nodes > 1:
        logger.info("the data are not cached: on several nodes, set data.cache to a folder that all share")
        return None
    return os.path.expanduser(os.environ.get(FOLDER_VARIABLE) or DEFAULT_FOLDER)


def existing(root: str, key: str) -> Cache:
    """An entry as it is: no folder is made. Raises DataError."""
    return _reopen(root, key)


def _reopen(root: str, key: str) -> Cache:
    cache = Cache.__new__(Cache)
    cache._open(root, key)
    return cache


def _system_of(root: str) -> tuple[Any, str]:
    from pyarrow import fs

    if scheme_of(root) in ARROW_SCHEMES:
        return inner_path(root)
    if scheme_of(root):
        raise DataError(root, "cannot hold the cache.", "Use a folder, or an s3://, gs:// or abfs:// address.")
    return fs.LocalFileSystem(), root
