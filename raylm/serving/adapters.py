"""Adapters by name, each in the version that its files have now.

A version is the hash of an adapter's files. Each version is copied once into a private folder and loaded from there
under an engine id of its own, so weights, and cached blocks of prompts, belong to one version for good: the engine may
drop an adapter and read it again, and the files may change meanwhile. The price is the copy.

No replica tells another anything. Each looks at the files when a request names the adapter, at most once in `fresh_s`
seconds, so that all follow the same root.
"""

import asyncio
import logging
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from raylm.data.remote import reason
from raylm.errors import DataError, ModelError, RaylmError, ServingError
from raylm.models.adapter_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Shape,
    check_servable,
    pickle_refused,
    read_config,
    read_shapes,
)
from raylm.serving.adapter_root import PICKLED, AdapterFiles, AdapterRoot
from raylm.serving.adapter_survey import Survey, copy_hashed, survey

logger = logging.getLogger(__name__)

IDLE_S = 600.0
"""The copy of a version that nobody has asked for in this time goes when the engine has dropped its weights."""
RETRY_S = 10.0
"""How long a root that did not answer is left alone while versions loaded before are served."""
_WRITE_PAUSE_S = 0.2


class UnknownAdapterError(ServingError):
    """There is no adapter of this name."""


class _BeingWrittenError(ServingError):
    """The files changed while they were read."""


@dataclass(slots=True)
class LoadedAdapter:
    """One version of an adapter: what the engine is told, and when it was asked for last."""

    name: str
    version: str
    rank: int
    engine_id: int
    folder: Path
    last_used: float = 0.0

    @property
    def engine_name(self) -> str:
        """Unique to the version: vLLM tells adapters of a batch, and cached blocks, apart by it."""
        return f"{self.name}@{self.version}"


class AdapterEngine(Protocol):
    """What holds the weights."""

    async def load(self, adapter: LoadedAdapter) -> None:
        """Loads a version. Raises ModelError with the engine's reason when it refuses."""
        ...

    async def unload(self, adapter: LoadedAdapter) -> None:
        """Drops a version's weights. Requests that run on it get them back."""
        ...

    async def loaded(self) -> set[int]:
        """The engine ids whose weights are held."""
        ...

    def in_flight(self) -> set[str]:
        """The engine names of the versions on which requests run."""
        ...


@dataclass(slots=True)
class _Entry:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    current: LoadedAdapter | None = None
    problem: RaylmError | None = None
    seen: str | None = None
    good_until: float = 0.0
    refreshing: asyncio.Task[None] | None = None
    """The last look at the files; it goes on when the request that it was begun for is cancelled."""


class AdapterPool:
    """The adapters of one replica.

    folder: private, for the copies. linear: see `check_servable`.
    """

    def __init__(
        self,
        root: AdapterRoot,
        engine: AdapterEngine,
        folder: Path,
        *,
        linear: dict[str, Shape] | None,
        max_rank: int,
    ) -> None:
        self.root = root
        self._engine, self._folder, self._linear, self._max_rank = engine, folder, linear, max_rank
        self._entries: dict[str, _Entry] = {}
        self._versions: list[LoadedAdapter] = []
        self._surveys: dict[str, Survey] = {}
        self._next_id = 0
        self._names: frozenset[str] = frozenset()
        self._names_good_until = 0.0
        self._survey_lock = asyncio.Lock()
        self._names_lock = asyncio.Lock()

    async def get(self, name: str, *, force: bool = False) -> LoadedAdapter:
        """The version that the files have now, loaded; at once where they were looked at within `fresh_s` seconds.

        A newer version that is refused, or cannot be read, does not replace the one that is loaded.
        force: look now, and try again what was refused. Raises UnknownAdapterError, ModelError for an adapter that is
        refused, and ServingError when the root does not answer.
        """
        asked = time.monotonic()
        entry = self._entries.get(name)
        if entry is None:
            if name not in await self._known(force=force):
                raise UnknownAdapterError(f"adapter {name}", "does not exist.")
            entry = self._entries.setdefault(name, _Entry())
        if force or not _is_fresh(entry, asked):
            async with entry.lock:
                if entry.refreshing is not None and not entry.refreshing.done():  # a cancelled request began it
                    await asyncio.wait((entry.refreshing,))
                if force or not _is_fresh(entry, asked):
                    entry.refreshing = asyncio.create_task(self._refresh(name, entry, force=force))
                    await asyncio.shield(entry.refreshing)
        if entry.current is None:
            assert entry.problem is not None
            raise entry.problem.with_traceback(None)  # one object, raised again for each request
        entry.current.last_used = time.time()
        return entry.current

    async def load(self, name: str, *, force: bool = False) -> None:
        """Has the engine hold an adapter's weights before a request asks. Raises what `get` raises, and ModelError
        where a new version was refused, also when an older one goes on."""
        adapter = await self.get(name, force=force)
        problem = self._entries[name].problem
        if problem is not None:
            raise problem.with_traceback(None)
        if adapter.engine_id not in await self._engine.loaded():
            await self._engine.load(adapter)

    async def unload(self, name: str) -> None:
        """Drops an adapter's weights in this replica; the next request loads them again.

        Raises UnknownAdapterError and ServingError.
        """
        if name not in self._entries and name not in await self._known():
            raise UnknownAdapterError(f"adapter {name}", "does not exist.")
        for adapter in [version for version in self._versions if version.name == name]:
            await self._engine.unload(adapter)
        await self._sweep()

    async def rows(self) -> list[dict[str, Any]]:
        """One row an adapter, sorted by name: name, version, rank, loaded, last_used (seconds since 1970), error.

        version: what a request would get now; of a remote root, what this replica loaded last.
        Raises ServingError when the root does not answer.
        """
        names = sorted(await self._known(force=True))
        if not self.root.remote:
            async with self._survey_lock:  # the first hashes all files; who asks meanwhile waits, and finds them hashed
                await asyncio.to_thread(self._survey_all, names)
        loaded = await self._engine.loaded()
        return [self._row(name, loaded) for name in names]

    def _row(self, name: str, loaded: set[int]) -> dict[str, Any]:
        entry, found = self._entries.get(name, _Entry()), self._surveys.get(name)
        current = entry.current
        servable = found if found is not None and found.problem is None else None
        version = servable.version if servable else current.version if current else None
        problem = None if isinstance(entry.problem, UnknownAdapterError) else entry.problem
        return {
            "name": name,
            "version": version,
            "rank": servable.rank if servable else current.rank if current else None,
            "loaded": current is not None and current.version == version and current.engine_id in loaded,
            "last_used": current.last_used if current else None,
            "error": found.problem if found is not None else str(problem) if problem else None,
        }

    def _survey_all(self, names: list[str]) -> None:
        for name in names:
            former = self._surveys.get(name)
            try:
                found = survey(self.root, name, linear=self._linear, max_rank=self._max_rank, known=former, hashed=True)
            except OSError:  # it goes away this very moment, or is being put there
                continue
            if found is not None:
                self._surveys[name] = found

    async def names(self) -> list[str]:
        """The names there are, sorted, as they were listed last. Raises ServingError when the root does not answer."""
        return sorted(await self._known())

    async def _known(self, *, force: bool = False) -> frozenset[str]:
        """The names there are, from one listing in `fresh_s` seconds, whoever asks for what."""
        async with self._names_lock:
            now = time.monotonic()
            if force or now >= self._names_good_until:
                try:
                    self._names = frozenset(await asyncio.to_thread(self.root.names))
                except (OSError, DataError) as error:
                    raise ServingError("the root of the adapters", f"does not answer: {error}.") from None
                self._names_good_until = now + self.root.fresh_s
            return self._names

    async def _refresh(self, name: str, entry: _Entry, *, force: bool) -> None:
        """Brings an entry up to its files, as they are at the beginning of the call or later."""
        began = time.monotonic()
        files = self.root.files(name)
        assert files is not None
        seen = None
        try:
            seen = await asyncio.to_thread(files.fingerprint)
            if seen is None:
                entry.current, entry.problem = None, UnknownAdapterError(f"adapter {name}", "does not exist.")
            elif force or seen != entry.seen or not _is_intact(entry):
                await self._load(name, entry, files, seen)
            entry.seen = seen
        except ModelError as error:
            entry.problem, entry.seen = error, seen
            logger.warning("%s%s", error, f" Version {entry.current.version} goes on." if entry.current else "")
        except _BeingWrittenError:
            if entry.current is None:
                raise
            entry.seen = None
        except (OSError, DataError) as error:
            entry.problem = ServingError(f"adapter {name}", f"cannot be read: {reason(error)}.", "Try again.")
            if entry.current is None:
                raise entry.problem from None
            logger.warning("%s Version %s goes on.", entry.problem, entry.current.version)
            entry.seen = None
            entry.good_until = began + max(RETRY_S, self.root.fresh_s)
            return
        entry.good_until = began + self.root.fresh_s

    async def _load(self, name: str, entry: _Entry, files: AdapterFiles, seen: str) -> None:
        """Makes the files' version the current one. Raises ModelError, OSError, DataError, _BeingWrittenError."""
        folder, version, rank = await self._settled_copy(name, files, seen, attempts=1 if entry.current else 6)
        # One engine id for one version at a time, also when files go back to what they were: vLLM's batches tell
        # adapters apart by name alone.
        same = (known for known in self._versions if (known.name, known.version) == (name, version))
        adapter = next(same, None)
        if adapter is None:
            self._next_id += 1
            adapter = LoadedAdapter(name, version, rank, self._next_id, folder)
            try:
                await self._engine.load(adapter)
            except ModelError:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            self._versions.append(adapter)
            logger.info("adapter %s: version %s, rank %d", name, version, rank)
        adapter.last_used = time.time()
        entry.current, entry.problem = adapter, None
        await self._sweep()

    async def _settled_copy(self, name: str, files: AdapterFiles, seen: str, *, attempts: int) -> tuple[Path, str, int]:
        """`_copy` of files that do not change meanwhile. Raises what it raises, and _BeingWrittenError."""
        for attempt in range(attempts):
            if attempt:
                await asyncio.sleep(_WRITE_PAUSE_S)
            refused, copy = None, None
            try:
                copy = await asyncio.to_thread(self._copy, name, files, seen)
            except ModelError as error:
                refused = error
            again = await asyncio.to_thread(files.fingerprint)
            if again == seen and refused is not None:
                raise refused
            if again == seen and copy is not None and (copy[0] / WEIGHTS_FILE).exists():
                return copy
            seen = again or ""
        raise _BeingWrittenError(f"adapter {name}", "its files are being written.", "Try again.")

    def _copy(self, name: str, files: AdapterFiles, seen: str) -> tuple[Path, str, int]:
        """Copies the files into a folder named by their hash. Returns folder, version and rank."""
        where = f"adapter {name}"
        if seen == PICKLED:
            raise pickle_refused(where)
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".partial", dir=self._folder))
        try:
            version = copy_hashed(files, partial)
            with (partial / CONFIG_FILE).open("rb") as config, (partial / WEIGHTS_FILE).open("rb") as weights:
                size = (partial / WEIGHTS_FILE).stat().st_size
                shapes = read_shapes(weights, where, num_bytes=size)
                rank = check_servable(
                    read_config(config, where), shapes, where, linear=self._linear, max_rank=self._max_rank
                )
            folder = self._folder / f"{name}@{version}"
            if not (folder / WEIGHTS_FILE).exists():
                shutil.rmtree(folder, ignore_errors=True)  # something tidied a part of it away
                partial.rename(folder)
            return folder, version, rank
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    async def _sweep(self) -> None:
        """Forgets versions that are out of use, and deletes their copies."""
        held, running = await self._engine.loaded(), self._engine.in_flight()
        forgotten = [item for item in self._versions if self._is_idle(item, held) and item.engine_name not in running]
        for adapter in forgotten:  # without a pause: nobody may be given a version whose copy goes
            self._versions.remove(adapter)
            entry = self._entries[adapter.name]
            if entry.current is adapter:
                entry.current, entry.seen, entry.good_until = None, None, 0.0
            shutil.rmtree(adapter.folder, ignore_errors=True)
        for adapter in forgotten:
            if adapter.engine_id in held:
                await self._engine.unload(adapter)

    def _is_idle(self, adapter: LoadedAdapter, held: set[int]) -> bool:
        is_current = self._entries[adapter.name].current is adapter
        return time.time() - adapter.last_used >= IDLE_S and not (is_current and adapter.engine_id in held)


def _is_fresh(entry: _Entry, asked: float) -> bool:
    """Whether the files were looked at late enough for a request that came at `asked`."""
    return asked < entry.good_until and _is_intact(entry)


def _is_intact(entry: _Entry) -> bool:
    return entry.current is None or (entry.current.folder / WEIGHTS_FILE).exists()
