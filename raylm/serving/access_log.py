"""One JSON object per request and line, for machines: logger `raylm.access`, no prompts unless asked for.

In a Serve replica the lines go to a file of their own beside the replica's log, so that each line is whole JSON.
"""

import json
import logging
import logging.handlers
import os
import time
from pathlib import Path
from typing import Any

logger = logging.getLogger("raylm.access")

MAX_FILE_BYTES = 100 * 2**20
NUM_FILES = 5


def write_line(fields: dict[str, Any]) -> None:
    """Writes one line. `logger.info` would look up its caller, which costs more than all the rest."""
    if not logger.isEnabledFor(logging.INFO):
        return
    line = json.dumps(fields, separators=(",", ":"), ensure_ascii=False)
    logger.handle(logging.LogRecord(logger.name, logging.INFO, "", 0, line, None, None))


def timestamp(seconds: float) -> str:
    """ISO 8601, UTC, with milliseconds. seconds: since the epoch."""
    whole = int(seconds)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{int((seconds - whole) * 1000):03d}Z"


def write_beside_the_replica_log() -> Path:
    """From now on, in a Serve replica: lines go to `logs/serve/access_DEPLOYMENT_REPLICA.log` of Ray's session."""
    from ray import serve
    from ray.serve._private.logging_utils import get_serve_logs_dir  # the folder has no public name

    replica = serve.get_replica_context()
    file = Path(get_serve_logs_dir()) / f"access_{replica.app_name}_{replica.deployment}_{replica.replica_tag}.log"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_to(file)
    return file


def write_to(file: Path) -> None:
    """From now on lines go to this file, readable by its owner only."""
    os.close(os.open(file, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
    handler = logging.handlers.RotatingFileHandler(
        file, maxBytes=MAX_FILE_BYTES, backupCount=NUM_FILES, encoding="utf-8"
    )
    handler.setFormatter(logging.Formatter("%(message)s"))
    stop_writing()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def stop_writing() -> None:
    """Closes the file."""
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
