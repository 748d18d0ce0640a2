"""The sweeps in tune/ would start: checked whole, with a tiny model and the repository's data for their own."""

from pathlib import Path

import pytest

from raylm.config import SweepConfig, load_config
from raylm.optim.table import OPTIMIZERS
from raylm.tuning.candidates import Candidates, with_base
from raylm.tuning.run import outline_sweep
from tests.tiny import build_tiny_model

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "tune").glob("*.yaml"))
TRIALS = {"lisa": 9, "lora": 12, "optimizers": 92, "optimizers_cpu": 46}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "model", max_position_embeddings=512, num_hidden_layers=4)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_would_start(path: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    overrides = {
        "set.model.path": str(tiny),
        "set.data.train": "examples/data/identity.json",
        "set.data.cache": False,
        "dir": str(tmp_path / "sweep"),
    }
    outline = outline_sweep(load_config(SweepConfig, path, overrides))
    assert outline.trials == TRIALS[path.stem]
    assert len(outline.first) == 8
    assert not (tmp_path / "sweep").exists()


def test_all_optimizers_of_the_table_are_compared_in_their_ranges(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(SweepConfig, ROOT / "tune" / "optimizers.yaml")
    points = Candidates(with_base(config), Path("sweep")).points()
    assert len({point["optimizer.name"] for point in points}) == 23
    for point in points:
        low, high = OPTIMIZERS[point["optimizer.name"]].learning_rates
        assert low <= point["optimizer.learning_rate"] <= high
