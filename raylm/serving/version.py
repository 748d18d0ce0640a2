"""When a replica is the same: a version of a deployment that follows from what it was made of.

Without one Serve gives each deployment a random version whenever the application is run again, so a change to one model
would start the others anew. Files count by name, size and time: weights that were replaced are another version.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import MutableMapping
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
    return json.dumps(settings, sort_keys=True), _files(value.model)


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


def _files(model: str) -> list[tuple[str, int, int]]:
    folder = Path(as_folder(model))
    if not folder.is_dir():
        return []
    files = [(file, file.stat()) for file in sorted(folder.iterdir()) if file.is_file()]
    return [(file.name, status.st_size, status.st_mtime_ns) for file, status in files]
