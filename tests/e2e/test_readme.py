"""Commands in the documentation: their settings are valid together, their files and options exist."""

import re
import shlex
from pathlib import Path

import pytest

from raylm.cli import parse
from raylm.config import SweepConfig, TrainConfig, load_config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("raylm "):
                    found.append((page.name, line))
    return found


@pytest.mark.parametrize(("page", "line"), _commands(), ids=lambda text: text[:60])
def test_a_documented_command_is_valid(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    options = parse(words)
    config = ROOT / str(getattr(options, "config", ""))
    if words[0] in ("train", "plan") and config.is_file():
        load_config(TrainConfig, str(config), options.overrides)
    elif words[0] == "sweep" and options.config and config.is_file():
        load_config(SweepConfig, str(config), [*options.overrides, *(f"set.{item}" for item in options.set)])
    elif "examples/" in line:
        assert all((ROOT / word).exists() for word in words if word.startswith("examples/"))


def test_there_are_commands_to_look_at() -> None:
    assert len(_commands()) > 15
