"""What a generation was started with: settings, model and input. Answers of two are never mixed in one output."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raylm.config import GenerateConfig
from raylm.data.files import HUB_SCHEME, fingerprint
from raylm.data.remote import scheme_of, shown
from raylm.data.sources import SourceFile
from raylm.errors import RunDirError

_FREE = (
    "prompts",
    "data",
    "output",
    "overwrite",
    "on_error",
    "num_replicas",
    "num_cpus",
    "batch_size",
    "shard_rows",
    "cluster_address",
    "kv_cache_gib",
)
"""Settings that may change from one start to the next; prompts and data stand in `input`."""

_FREE_OF_ENGINE = (
    "max_num_seqs",
    "max_num_batched_tokens",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "tensor_parallel_size",
    "pipeline_parallel_size",
)
"""Arguments of vLLM that decide where and how many at a time, not what is answered."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """settings: as dumped; model: what changes when its files do; input: name of a file -> what changes when it does.

    result: counts of a finished run, and the size of its output.
    """

    settings: dict[str, Any]
    model: str
    input: dict[str, Any]
    result: dict[str, Any] | None = None

    @property
    def is_of_prompts(self) -> bool:
        """Whether the run answered prompts alone: such a run is begun anew, not gone on with."""
        return list(self.input) == ["prompts"]


def describe(config: GenerateConfig, folder: str, files: Sequence[SourceFile]) -> Manifest:
    """The manifest of a run; folder: what `as_folder` gave for the model. Raises DataError."""
    settings = {key: value for key, value in config.model_dump(mode="json").items() if key not in _FREE}
    settings["engine"] = {key: value for key, value in settings["engine"].items() if key not in _FREE_OF_ENGINE}
    found: dict[str, Any] = {}
    if config.prompts:
        found["prompts"] = hashlib.sha256(json.dumps(config.prompts).encode()).hexdigest()
    for file in files:
        version = "" if scheme_of(file.path) == HUB_SCHEME else fingerprint(file.path)
        options = asdict(file)
        del options["weight"], options["path"]
        name = shown(file.path)
        while name in found:  # splits of one hub dataset
            name += "+"
        found[name] = {"version": version, **json.loads(json.dumps(options))}
    versions = [_model_version(path) for path in (folder, config.adapter) if path is not None]
    return Manifest(settings, ":".join(versions), found)


def read_manifest(path: Path) -> Manifest | None:
    """The manifest at `path`, if there is one. Raises RunDirError where it is damaged."""
    if not path.is_file():
        return None
    try:
        return Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise RunDirError(str(path), "is no manifest of answers.", "Start anew with overwrite=true.") from None


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Complete or not at all."""
    scratch = path.with_name(f".{path.name}.partial")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(manifest), indent=1, ensure_ascii=False))
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def differences(there: Manifest, now: Manifest) -> list[str]:
    """What is not the same, a short sentence each."""
    found = [
        f"{key} was {_short(there.settings.get(key))} and is {_short(now.settings.get(key))}"
        for key in sorted({*there.settings, *now.settings})
        if there.settings.get(key) != now.settings.get(key)
    ]
    if not found and there.model != now.model:
        found.append("the files of the model have changed")
    changed = [name for name in now.input if name in there.input and there.input[name] != now.input[name]]
    found += [_changed(name, there.input[name], now.input[name]) for name in changed]
    found += [f"{name} is no longer part of the input" for name in there.input if name not in now.input]
    found += [f"{name} is new in the input" for name in now.input if name not in there.input]
    if not found and list(there.input) != list(now.input):
        found.append("the order of the input has changed")
    return found


def _changed(name: str, there: Any, now: Any) -> str:
    if isinstance(there, Mapping) and isinstance(now, Mapping) and there.get("version") == now.get("version"):
        keys = [key for key in now if there.get(key) != now[key]]
        return f"{keys[0]} of {name} has changed"
    return f"{name} has changed" if name != "prompts" else "prompts have changed"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


def _model_version(folder: str) -> str:
    """Sizes and times of the files of a local model; empty for a hub id."""
    path = Path(folder)
    if not path.is_dir():
        return ""
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.suffix in (".safetensors", ".json", ".jinja", ".model"):
            status = file.stat()
            digest.update(f"{file.name}:{status.st_size}:{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
