"""When a replica is the same: a version of a deployment that follows from what it was made of.

Without one Serve gives each deployment a random version whenever the application is run again, so a change to one model
would start the others anew. Files count by name, size and time: weights that were replaced are another version.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from raylm.config.serving import ServeArgs
from raylm.models.folder import as_folder


def versioned(deployment: Any, versions: MutableMapping[str, str], *made_of: Any) -> Any:
    """The Serve deployment with the version it has in `versions` by its name, else with that of `made_of`, which is
    noted there."""
    version = versions.setdefault(deployment.name, fingerprint(*made_of))
    return deployment.options(version=version, _internal=True)  # Ray 2.60 has no public way


def fingerprint(*made_of: Any) -> str:
    """16 hexadecimal digits that differ when one of the arguments, the files of a model or raylm does."""
    text = repr([importlib.metadata.version("raylm"), *map(_plain, made_of)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if not isinstance(value, ServeArgs):
        return value
    settings = value.model_dump(mode="json", exclude=_NOT_OF_A_REPLICA)
    drafter = value.speculation.model if value.speculation is not None else None
    return json.dumps(settings, sort_keys=True), _files(value.model), _files(drafter), _template(value.engine)


_NOT_OF_A_REPLICA = {
    "num_replicas",
    "target_ongoing_requests",
    "downscale_delay_s",
    "drain_timeout_s",
    "routing",
    "api_key_file",
    "gateway",
    "models",
}


def _files(model: str | None) -> list[tuple[str, int, int]]:
    """What is in a model's folder; nothing for a hub id, and for no model."""
    folder = Path(as_folder(model)) if model else None
    if folder is None or not folder.is_dir():
        return []
    return [_mark(file) for file in sorted(folder.iterdir()) if file.is_file()]


def _template(engine: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """The chat template, where it is a file: vLLM takes the template itself as well."""
    named = engine.get("chat_template")
    try:
        file = Path(named) if isinstance(named, str) else None
        return [_mark(file)] if file is not None and file.is_file() else []
    except OSError:  # a text too long to be a name
        return []


def _mark(file: Path) -> tuple[str, int, int]:
    status = file.stat()
    return file.name, status.st_size, status.st_mtime_ns
