"""Every configuration in examples/ is a run that would start: loaded and planned, with a tiny model for its own."""

from pathlib import Path

import pytest

import raylm
from raylm.config import TrainConfig, load_config
from raylm.models.vocabulary import NEW_ROWS
from tests.tiny import build_tiny_model

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    return build_tiny_model(folder, max_position_embeddings=512, **{NEW_ROWS: [300, 3]})


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_can_be_planned(path: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # its data are named from there
    overrides = {"model.path": str(tiny), "run.dir": str(tmp_path / "run"), "data.cache": False}
    plan = raylm.plan(path, overrides, tokens_per_second=1000.0)
    assert plan.steps >= 4
    assert plan.fits
    assert plan.trainable_parameters > 0


def test_each_method_and_strategy_has_one() -> None:
    configs = [load_config(TrainConfig, path) for path in EXAMPLES]
    assert {config.training.method for config in configs} >= {"full", "lora", "qlora", "lisa", "new_rows"}
    assert {config.strategy for config in configs} >= {"single", "ddp", "fsdp", "deepspeed"}
    assert {config.deepspeed_or_default.stage for config in configs if config.strategy == "deepspeed"} == {2, 3}
    assert any(config.deepspeed_or_default.offload_param for config in configs)
    assert len({config.run.dir for config in configs}) == len(configs)
