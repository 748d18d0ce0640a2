"""Adapters by name, each in the version that its files have now.

A version is the hash of an adapter's files. Each version is copied once into a private folder and loaded from there
under an engine id of its own, so weights, and cached blocks of prompts, belong to one version for good: the engine may
drop an adapter and read it again, and the files may change meanwhile. The price is the copy.

No replica tells another anything. Each looks at the files when a request names the adapter, at most once in `fresh_s`
seconds, so that all follow the same root.
"""

import asyncio
import hashlib
import logging
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from raylm.config.serving import ServeArgs
from raylm.data.remote import scheme_of
from raylm.errors import ConfigError, DataError, ModelError, RaylmError, ServingError
from raylm.models.adapter_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Shape,
    check_servable,
    linear_shapes,
    pickle_refused,
    read_config,
    read_shapes,
    servable_rank,
)
from raylm.models.folder import as_folder
from raylm.serving.adapter_root import PICKLED, AdapterFiles, AdapterRoot, open_root, open_single

logger = logging.getLogger(__name__)

DEFAULT_RANK = 64
"""The rank that engines make room for when no adapter is there at the start."""
IDLE_S = 600.0
"""The copy of a version that nobody has asked for in this time goes when the engine has dropped its weights."""
CPU_EXTENSION = "raylm.serving.cpu_adapters.CorrectedWorker"
RETRY_S = 10.0
"""How long a root that did not answer is left alone while versions loaded before are served."""
_VERSION_DIGITS = 16
_READERS = 16
_ENGINE_KEYS = {
    "enable_lora": "Leave it out: they set it.",
    "max_lora_rank": "Set max_adapter_rank.",
    "lora_modules": "Put those adapters below `adapters`.",
}
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


@dataclass(frozen=True, slots=True)
class Survey:
    """What an adapter's files say of themselves; `problem` is why it is not served."""

    fingerprint: str
    rank: int | None = None
    version: str | None = None
    problem: str | None = None


@dataclass(slots=True)
class _Entry:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    current: LoadedAdapter | None = None
    problem: RaylmError | None = None
    seen: str | None = None
    good_until: float = 0.0


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
                if force or not _is_fresh(entry, asked):
                    await self._refresh(name, entry, force=force)
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
            entry.problem = ServingError(f"adapter {name}", f"cannot be read: {_reason(error)}.", "Try again.")
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
        partial = self._folder / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            version = _copy_hashed(files, partial)
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


def open_adapters(args: ServeArgs) -> AdapterRoot | None:
    """The root that a configuration names; None when it names none. Raises ServingError."""
    if args.adapter is not None:
        return open_single(args.adapter)
    return open_root(args.adapters) if args.adapters is not None else None


def resolve_adapters(args: ServeArgs, *, warn: bool = True) -> dict[str, Any]:
    """Checks what can be checked before an engine starts, and returns the settings as a replica elsewhere needs them.

    An `adapter` that cannot be served is refused; of `adapters` the others are served, with a warning for it.
    `max_adapter_rank` becomes the one that engines make room for: replicas must not choose for themselves.
    Raises ConfigError, ModelError and ServingError.
    """
    root = open_adapters(args)
    if root is None:
        return {}
    for key, remedy in _ENGINE_KEYS.items():
        if key in args.engine:
            raise ConfigError(f"engine.{key}", "excludes adapter and adapters.", remedy)
    linear = linear_shapes(as_folder(args.model))
    limit = servable_rank(args.max_adapter_rank) if args.max_adapter_rank else None
    try:
        with ThreadPoolExecutor(_READERS) as pool:
            found = list(pool.map(lambda name: survey(root, name, linear=linear, max_rank=limit), root.names()))
        ignored = root.ignored()
    except (OSError, DataError) as error:
        raise ServingError("adapters", f"cannot be read: {_reason(error)}.", "Check the address.") from None
    there = [item for item in found if item is not None]
    if args.adapter is not None:
        _insist(args.adapter, there)
    if warn:
        for name, reason in ignored:
            logger.warning("adapter %r %s: it is not served.", name, reason)
        for item in there:
            if item.problem:
                logger.warning("%s Other adapters are served.", item.problem)
    highest = max((item.rank for item in there if item.rank is not None), default=DEFAULT_RANK)
    return {
        "adapter": _absolute(args.adapter),
        "adapters": _absolute(args.adapters),
        "max_adapter_rank": limit or servable_rank(highest),
    }


def engine_settings(args: ServeArgs, *, on_cpu: bool) -> dict[str, Any]:
    """vLLM's arguments for the adapters of a configuration whose `max_adapter_rank` is resolved."""
    if args.adapter is None and args.adapters is None:
        return {}
    rank = servable_rank(args.max_adapter_rank or DEFAULT_RANK)
    count = 1 if args.adapter is not None else args.max_adapters
    # Room for one more of a single adapter: a new version is loaded while requests run on the former.
    slots = count + 1 if args.adapter is not None else count
    settings = {"enable_lora": True, "max_loras": slots, "max_cpu_loras": slots, "max_lora_rank": rank}
    return settings | ({"worker_extension_cls": CPU_EXTENSION} if on_cpu else {})


def survey(
    root: AdapterRoot,
    name: str,
    *,
    linear: dict[str, Shape] | None,
    max_rank: int | None,
    known: Survey | None = None,
    hashed: bool = False,
) -> Survey | None:
    """What can be said of an adapter without loading it; None when there is none.

    known: the last answer, good while the files are the same. hashed: with the version, which reads all of them.
    Raises OSError and DataError.
    """
    files, where = root.files(name), f"adapter {name}"
    assert files is not None
    seen = ""
    try:
        seen = files.fingerprint() or ""
        if not seen:
            return None
        if seen == PICKLED:
            raise pickle_refused(where)
        if known is not None and known.fingerprint == seen:
            return known
        with files.open(CONFIG_FILE) as config, files.open(WEIGHTS_FILE) as weights:
            shapes = read_shapes(weights, where, num_bytes=files.num_bytes(WEIGHTS_FILE))
            rank = check_servable(read_config(config, where), shapes, where, linear=linear, max_rank=max_rank)
        return Survey(seen, rank, _hash(files) if hashed else None)
    except ModelError as error:
        return Survey(seen, problem=str(error))


def _absolute(address: str | None) -> str | None:
    return address if address is None or scheme_of(address) else str(Path(address).expanduser().absolute())


def _insist(address: str, found: list[Survey]) -> None:
    if not found:
        raise ModelError(
            address, f"has no {CONFIG_FILE} and {WEIGHTS_FILE}, so it is no adapter.", "Give a PEFT adapter folder."
        )
    if found[0].problem:
        where, _, problem = found[0].problem.partition(": ")
        raise ModelError(address, problem or where)


def _copy_hashed(files: AdapterFiles, folder: Path) -> str:
    digest = hashlib.sha256()
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        with files.open(file) as source, (folder / file).open("wb") as target:
            _digest(digest, file, source, target)
    return digest.hexdigest()[:_VERSION_DIGITS]


def _hash(files: AdapterFiles) -> str:
    digest = hashlib.sha256()
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        with files.open(file) as source:
            _digest(digest, file, source)
    return digest.hexdigest()[:_VERSION_DIGITS]


def _digest(digest: Any, file: str, source: BinaryIO, target: BinaryIO | None = None) -> None:
    """Name, bytes and their number, so that what belongs to one file cannot pass for the other's."""
    digest.update(file.encode() + b"\0")
    count = 0
    while piece := source.read(2**20):
        digest.update(piece)
        count += len(piece)
        if target is not None:
            target.write(piece)
    digest.update(count.to_bytes(8, "little"))


def _is_fresh(entry: _Entry, asked: float) -> bool:
    """Whether the files were looked at late enough for a request that came at `asked`."""
    return asked < entry.good_until and _is_intact(entry)


def _is_intact(entry: _Entry) -> bool:
    return entry.current is None or (entry.current.folder / WEIGHTS_FILE).exists()


def _reason(error: BaseException) -> str:
    return (next(iter(str(error).splitlines()), "") or type(error).__name__).rstrip(".")
