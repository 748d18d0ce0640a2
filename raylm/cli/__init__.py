"""`raylm`, the command: entry.py reads its words; a group of commands is a file that declares and runs them."""

from raylm.cli.entry import main, parse

__all__ = ["main", "parse"]
