"""Layers point down: every import in raylm/ is read, those inside functions too."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "raylm"
LAYERS = {
    "errors": 0,
    "words": 0,
    "config": 1,
    "ray_session": 2,
    "data": 3,
    "models": 3,
    "optim": 3,
    "training": 4,
    "inference": 4,
    "merging": 4,
    "vocabulary": 4,
    "distillation": 5,
    "tuning": 5,
    "alignment": 5,
    "evaluation": 5,
    "serving": 5,
    "": 6,
    "cli": 7,
}


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "raylm" else {module}
    return {name for name in found if name == "raylm" or name.startswith("raylm.")}


def _room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else ""


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    room = "" if room == "__init__" else room
    for name in _imports(path):
        other = _room(name)
        allowed = other == room or LAYERS[other] < LAYERS[room]
        assert allowed, f"raylm/{path.relative_to(ROOT)} (layer {LAYERS[room]}) imports {name} (layer {LAYERS[other]})"


def test_the_loop_knows_no_ray() -> None:
    for name in ("loop", "worker", "checkpoint", "module", "losses", "batch", "state"):
        tree = ast.parse((ROOT / "training" / f"{name}.py").read_text())
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert not any(module and module.split(".")[0] == "ray" for module in modules), name
