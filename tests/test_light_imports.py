"""Help and configuration errors answer at once: none of the heavy packages is imported for them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

HEAVY = (
    "torch",
    "ray",
    "transformers",
    "vllm",
    "peft",
    "datasets",
    "numpy",
    "pyarrow",
    "matplotlib",
    "wandb",
    "mlflow",
)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["config", "show", "no-such.yaml"],
        ["train", "no-such.yaml"],
        ["plan", "no-such.yaml"],
        ["sweep", "--help"],
        ["sweep", "no-such.yaml"],
        ["vocab", "extend", "--help"],
        ["speculate", "bench", "m", "speculation.method=ngrm"],
        ["distill-draft", "m", "--data", "d", "--output", "o", "--layers", "0,x"],
        ["track", "no-such-run"],
        ["optim", "list"],
    ],
)
def test_no_heavy_package_is_imported(arguments: list[str]) -> None:
    assert heavy_after(arguments)[0] == []


def heavy_after(arguments: list[str]) -> tuple[list[str], str]:
    """Heavy packages that a command imports, and what it says."""
    code = f"""
import json
import sys
from raylm.cli import main
try:
    main({arguments!r})
except SystemExit:
    pass
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"train": "absent.json"}}, "absent.json: there is no such file"),
        ({"optimizer": {"name": "lyon"}}, "'lyon' is not an optimizer. Did you mean lion?"),
        ({"optimizer": {"name": "schedulefree_adamw"}}, "excludes schedule.name=cosine"),
        ({"model": {"path": "./absent"}}, "./absent: there is no such file or folder"),
    ],
)
@pytest.mark.parametrize("command", ["train", "plan", "sweep"])
def test_what_settings_and_names_show_is_refused_before_the_heavy_imports(
    command: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "d.json").write_text("{}")
    tree = {"model": {"path": "m"}, "data": {"train": str(tmp_path / "d.json")}, **change}
    if command == "sweep":
        space = {"optimizer.learning_rate": {"uniform": [1e-5, 1e-4]}}
        tree = {"base": tree, "space": space, "budget": {"trials": 2}, "dir": str(tmp_path / "sweep")}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    heavy, said = heavy_after([command, str(tmp_path / "c.yaml")])
    assert message in said
    assert not {"torch", "ray", "transformers"} & set(heavy)


@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_run_directory_that_is_taken_is_refused_before_the_heavy_imports(command: str, tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text("{}")
    tree = {"model": {"path": "m"}, "data": {"train": str(tmp_path / "d.json")}, "run": {"dir": str(tmp_path)}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    heavy, said = heavy_after([command, str(tmp_path / "c.yaml")])
    assert "is a folder that holds something else than a run" in said
    assert not {"torch", "ray", "transformers"} & set(heavy)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["output=answers.txt"], "answers.txt: has an unknown ending"),
        (["output=absent/answers.jsonl"], "its folder does not exist"),
        (["output=/proc/answers.jsonl"], "/proc/answers.jsonl: cannot be written"),
        (["data=absent.json"], "absent.json: there is no such file or folder. Check the setting data.\n"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_the_heavy_imports(settings: list[str], message: str) -> None:
    heavy, said = heavy_after(["generate", "m", "Who are you?", *settings])
    assert message in said
    assert not {"torch", "ray", "transformers", "vllm"} & set(heavy)


def test_the_package_itself_is_light() -> None:
    code = "import sys, raylm, raylm.config, raylm.errors; print([n for n in ('torch', 'ray') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
