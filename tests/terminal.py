"""A terminal to draw on, and what stands in its lines."""

import io
import logging
import re
import time
from contextlib import AbstractContextManager

import pytest


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def line_with(self, words: str) -> str:
        """The one line that holds the words, without control sequences."""
        (line,) = (part for part in re.split(r"\n|\r", self.getvalue()) if words in part)
        return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line)


def check_log_stands_above(
    watching: AbstractContextManager[object], terminal: Terminal, drawn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logs a line while `drawn` stands in the terminal: it has a line of its own there, and the handler its stream."""
    handler = logging.StreamHandler(terminal)
    monkeypatch.setattr(logging.root, "handlers", [handler])
    with watching:
        while drawn not in terminal.getvalue():
            time.sleep(0.01)
        logging.getLogger("raylm").warning("one line")
        time.sleep(0.3)
    assert handler.stream is terminal
    assert terminal.line_with("one line") == "one line"
