"""How far a generation is, a line now and then."""

import logging
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Progress:
    """Says after `interval_s` at the earliest what was done since the last line, and what is left."""

    def __init__(
        self,
        num_rows: int | None,
        *,
        rows: int = 0,
        tokens: int = 0,
        interval_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """num_rows: of the whole input, where it is known; rows, tokens: done by former starts."""
        self.num_rows = num_rows
        self._interval_s, self._clock = interval_s, clock
        self._begun_rows, self._begun_tokens = rows, tokens
        self._last: tuple[float, int, int] = (clock(), rows, tokens)
        self._begun: float | None = None

    def update(self, rows: int, tokens: int, failed: int, seconds: float) -> str | None:
        """rows, tokens, failed: done so far, former starts included; seconds: that the latest answers have taken.
        Returns the line that it logged, if any.

        Loading the engine is no part of the rates: they count from when the first answers were asked for.
        """
        now = self._clock()
        if self._begun is None:
            self._begun = now - seconds
            self._last = (self._begun, self._begun_rows, self._begun_tokens)
        then, rows_then, tokens_then = self._last
        elapsed = now - then
        if elapsed < self._interval_s:
            return None
        self._last = (now, rows, tokens)
        rate = (rows - rows_then) / elapsed
        of = f" of {self.num_rows}" if self.num_rows is not None else ""
        parts = [f"{rows}{of} rows", f"{rate:.1f} rows/s", f"{(tokens - tokens_then) / elapsed:.0f} tokens/s"]
        overall = (rows - self._begun_rows) / (now - self._begun)
        if self.num_rows is not None and overall > 0:
            parts.append(f"about {duration(max(0, self.num_rows - rows) / overall)} left")
        if failed:
            parts.append(f"{failed} failed")
        line = ", ".join(parts)
        logger.info("%s", line)
        return line

    def tokens_per_second(self, tokens: int) -> float | None:
        """Since the first answers were asked for; None where none came. tokens: done so far."""
        if self._begun is None:
            return None
        return (tokens - self._begun_tokens) / max(1e-9, self._clock() - self._begun)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
