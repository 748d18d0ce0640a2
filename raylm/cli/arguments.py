"""How the files of commands declare them."""

import argparse
from collections.abc import Callable
from typing import Any


def add_group(commands: Any, name: str, summary: str) -> Any:
    """Where the commands `raylm NAME …` are added."""
    return commands.add_parser(name, help=summary).add_subparsers(required=True, metavar="COMMAND")


def add_command(commands: Any, name: str, run: Callable[[Any], int | None], summary: str) -> argparse.ArgumentParser:
    """A command: `run` gets its options and returns an exit code, None for 0."""
    added: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary.capitalize() + ".")
    added.add_argument("--json", action="store_true", help="print the result as one JSON object on stdout")
    added.set_defaults(run=run)
    return added


def add_overrides(command: argparse.ArgumentParser) -> None:
    """The command takes settings behind its other arguments."""
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings over those of the file")
