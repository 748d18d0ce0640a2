"""What was deployed before: configurations without secrets, kept by the cluster as long as it lives.

Ray's internal key-value store of the head node holds them, where Serve keeps its own state too; whoever is connected
to the cluster can go back. Ray 2.60 has no public interface to it, so it is touched here only.
"""

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from raylm.config.serving import ModelArgs, ServeConfig
from raylm.errors import ConfigError
from raylm.models.drafts import portable
from raylm.serving.adapter_survey import absolute_address
from raylm.serving.app import checked_models
from raylm.serving.models import models_of

KEPT = 10
_KEY, _NAMESPACE = b"deployed", b"raylm"
_SECRET = re.compile(r"token(?!s|_id|iz)|secret|password|api_key", re.I)


@dataclass(frozen=True, slots=True)
class Revision:
    """One version of the application."""

    number: int
    at: str
    """UTC, as 2026-01-31T12:00:00Z."""
    settings: dict[str, Any]
    """A ServeConfig: the fields that were set."""
    versions: dict[str, str]
    """The version of each deployment (version.py)."""
    has_key: bool
    """Whether clients are asked for an API key."""

    @property
    def config(self) -> ServeConfig:
        """The configuration as it was."""
        return ServeConfig.model_validate(self.settings)


def check_storable(config: ServeConfig) -> None:
    """Raises ConfigError when an engine argument looks like a secret: it would stand in the cluster's store."""
    engines = [("engine", config.engine)]
    engines += [(f"models.{index}.engine", model.engine) for index, model in enumerate(config.models)]
    for where, engine in engines:
        for path in _paths(engine, where):
            key = path.rpartition(".")[2]
            if _SECRET.search(key) and not key.startswith(("max_", "min_", "num_")):
                raise ConfigError(path, "is a secret.", "Set it in the environment of the nodes instead.")


def _paths(value: Any, where: str) -> Iterator[str]:
    """The dotted path of every key in nested mappings and lists."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, inner in items:
        yield f"{where}.{key}"
        yield from _paths(inner, f"{where}.{key}")


def revisions() -> list[Revision]:
    """Oldest first; the last is the running one."""
    from ray.experimental.internal_kv import _internal_kv_get

    stored = _internal_kv_get(_KEY, namespace=_NAMESPACE)
    return [Revision(**row) for row in json.loads(stored)] if stored else []


def prepared(config: ServeConfig, *, has_key: bool) -> Revision:
    """What `append` is to note of this configuration once it runs.

    Reads files, so it comes before the start: what fails here must not fail when the new version has taken over.
    Raises RaylmError.
    """
    return Revision(0, "", _absolute(config).model_dump(mode="json", exclude_unset=True), {}, has_key)


def append(revision: Revision, versions: Mapping[str, str]) -> None:
    """Notes that a prepared revision is the running one, under these versions."""
    kept = revisions()
    number = kept[-1].number + 1 if kept else 1
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    _store([*kept, replace(revision, number=number, at=at, versions=dict(versions))])


def go_back(versions: Mapping[str, str]) -> None:
    """Notes that the one before the last is running again, under these versions."""
    *older, before, _ = revisions()
    _store([*older, replace(before, versions=dict(versions))])


def clear() -> None:
    """Forgets all."""
    from ray.experimental.internal_kv import _internal_kv_del

    _internal_kv_del(_KEY, namespace=_NAMESPACE)


def _store(kept: list[Revision]) -> None:
    from ray.experimental.internal_kv import _internal_kv_put

    rows = [asdict(revision) for revision in kept[-KEPT:]]
    _internal_kv_put(_KEY, json.dumps(rows).encode(), overwrite=True, namespace=_NAMESPACE)


def _absolute(config: ServeConfig) -> ServeConfig:
    """Paths as they are found from any folder: the configuration may be used again from another."""
    located = [model.model for model in checked_models(config)]
    changes = _beside_the_model(config)
    if config.models:
        entries = zip(config.models, located, strict=True)
        changes["models"] = [
            entry.model_copy(update={"model": path, **_beside_the_model(entry)}) for entry, path in entries
        ]
    else:
        changes["model"] = located[0]
        changes["name"] = models_of(config)[0].name
    for key in ("api_key_file", "tls_cert_file", "tls_key_file"):
        file = getattr(config, key)
        if file is not None:
            changes[key] = os.path.abspath(os.path.expanduser(file))
    return config.model_copy(update=changes)


def _beside_the_model(args: ModelArgs) -> dict[str, Any]:
    """The other paths that these arguments themselves name."""
    found: dict[str, Any] = {
        key: absolute_address(getattr(args, key)) for key in ("adapter", "adapters") if getattr(args, key) is not None
    }
    if args.speculation is not None:
        found["speculation"] = portable(args.speculation)
    return found
