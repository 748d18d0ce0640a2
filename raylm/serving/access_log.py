"""One JSON object per request and line, for machines: logger `raylm.access`, no prompts unless asked for.

In a Serve replica the lines go to a file of their own beside the replica's log, so that each line is whole JSON. They
are written together, a few times a second: a write per request costs more than all else that stands before the
routes. A replica that is killed takes its last quarter of a second along.
"""

import asyncio
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
FLUSH_S = 0.25
_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


def write_line(fields: dict[str, Any]) -> None:
    """Writes one line. `logger.info` would look up its caller, which costs more than all the rest."""
    if logger.isEnabledFor(logging.INFO):
        logger.handle(logging.LogRecord(logger.name, logging.INFO, "", 0, _encode(fields), None, None))


def timestamp(seconds: float) -> str:
    """ISO 8601, UTC, with milliseconds. seconds: since the epoch."""
    whole = int(seconds)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{int((seconds - whole) * 1000):03d}Z"


def write_beside_the_replica_log() -> Path:
    """From now on, in a Serve replica: lines go to `logs/serve/access_APP_DEPLOYMENT_REPLICA.log` of Ray's session."""
    from ray import serve
    from ray.serve._private.logging_utils import get_serve_logs_dir  # the folder has no public name

    replica = serve.get_replica_context()
    file = Path(get_serve_logs_dir()) / f"access_{replica.app_name}_{replica.deployment}_{replica.replica_tag}.log"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_to(file)
    return file


def write_to(file: Path) -> None:
    """From now on lines go to this file, readable by its owner only, until `stop_writing`."""
    stop_writing()
    logger.addHandler(BatchedFile(file))
    logger.setLevel(logging.INFO)
    logger.propagate = False


def stop_writing() -> None:
    """Writes what is left, and closes the file."""
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()


class _OwnersFile(logging.handlers.RotatingFileHandler):
    """Every file it begins, the first and each after a rotation, is readable by its owner only."""

    def _open(self) -> Any:
        os.close(os.open(self.baseFilename, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
        return super()._open()


class BatchedFile(logging.Handler):
    """A rotated file that gets its lines in batches, FLUSH_S after the first of each, and at the end of the process."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = _OwnersFile(file, maxBytes=MAX_FILE_BYTES, backupCount=NUM_FILES, encoding="utf-8")
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if not self._lines:
            try:
                asyncio.get_running_loop().call_later(FLUSH_S, self.flush)
            except RuntimeError:  # no loop: nobody would come back
                self._lines.append(record.getMessage())
                self.flush()
                return
        self._lines.append(record.getMessage())

    def flush(self) -> None:
        lines, self._lines = self._lines, []
        if lines:
            self._file.handle(logging.LogRecord(logger.name, logging.INFO, "", 0, "\n".join(lines), None, None))

    def close(self) -> None:
        self.flush()
        self._file.close()
        super().close()
