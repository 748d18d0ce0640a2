"""Help and configuration errors answer at once: none of the heavy packages is imported for them."""

import subprocess
import sys

import pytest

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
    code = f"""
import sys
from raylm.cli import main
try:
    main({arguments!r})
except SystemExit:
    pass
print("HEAVY:" + ",".join(name for name in {HEAVY!r} if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY:"


def test_the_package_itself_is_light() -> None:
    code = "import sys, raylm, raylm.config, raylm.errors; print([n for n in ('torch', 'ray') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
