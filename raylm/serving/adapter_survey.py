"""The adapters that a configuration names, as far as their files tell: what is refused before an engine starts, what
engines are told, and the version that files are.
"""

import hashlib
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from raylm.config.serving import ServeArgs
from raylm.data.remote import reason, scheme_of
from raylm.errors import ConfigError, DataError, ModelError, ServingError
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
CPU_EXTENSION = "raylm.serving.cpu_adapters.CorrectedWorker"
_VERSION_DIGITS = 16
_READERS = 16
_ENGINE_KEYS = {
    "enable_lora": "Leave it out: they set it.",
    "max_lora_rank": "Set max_adapter_rank.",
    "lora_modules": "Put those adapters below `adapters`.",
}


@dataclass(frozen=True, slots=True)
class Survey:
    """What an adapter's files say of themselves; `problem` is why it is not served."""

    fingerprint: str
    rank: int | None = None
    version: str | None = None
    problem: str | None = None


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
        raise ServingError("adapters", f"cannot be read: {reason(error)}.", "Check the address.") from None
    there = [item for item in found if item is not None]
    if args.adapter is not None:
        _insist(args.adapter, there)
    if warn:
        for name, why in ignored:
            logger.warning("adapter %r %s: it is not served.", name, why)
        for item in there:
            if item.problem:
                logger.warning("%s Other adapters are served.", item.problem)
    highest = max((item.rank for item in there if item.rank is not None), default=DEFAULT_RANK)
    return {
        "adapter": absolute_address(args.adapter),
        "adapters": absolute_address(args.adapters),
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


def absolute_address(address: str | None) -> str | None:
    """The address as a process with another working directory finds it."""
    return address if address is None or scheme_of(address) else str(Path(address).expanduser().absolute())


def _insist(address: str, found: list[Survey]) -> None:
    if not found:
        raise ModelError(
            address, f"has no {CONFIG_FILE} and {WEIGHTS_FILE}, so it is no adapter.", "Give a PEFT adapter folder."
        )
    if found[0].problem:
        where, _, problem = found[0].problem.partition(": ")
        raise ModelError(address, problem or where)


def copy_hashed(files: AdapterFiles, folder: Path) -> str:
    """Copies an adapter's two files into a folder and returns their version. Raises OSError and DataError."""
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
