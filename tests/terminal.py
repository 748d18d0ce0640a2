"""A terminal to draw on, and what stands in its lines."""

import io
import re


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def line_with(self, words: str) -> str:
        """The one line that holds the words, without control sequences."""
        (line,) = (part for part in re.split(r"\n|\r", self.getvalue()) if words in part)
        return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line)
