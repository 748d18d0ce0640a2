"""The moving average of the weights against a loop over the checkpoints of every step."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from raylm.config.sections import ModelSection
from raylm.errors import ConfigError
from raylm.models.load import load_model
from raylm.training.batch import to_batch
from raylm.training.checkpoint import list_checkpoints
from raylm.training.module import LossModule
from tests.training.ranks import Ranks, ranks, train_rank
from tests.training.support import Rows, make_config, make_plan, read_checkpoint, run_in_process

ROWS = Rows()
DECAY = 0.8
SETTINGS = (f"training.ema_decay={DECAY}", "checkpoint.interval_steps=1", "checkpoint.keep_last=99")


def _averages(model_dir: Path, run_dir: Path) -> dict[str, torch.Tensor]:
    """By the formula, from the base and the weights after each step."""
    module = LossModule(load_model(ModelSection(path=str(model_dir)), torch.device("cpu")))
    average = {f"model/{name}": parameter.detach().clone() for name, parameter in module.trainable()}
    for path in list_checkpoints(run_dir / "checkpoints"):
        state = read_checkpoint(path)
        for name in average:
            average[name] = DECAY * average[name] + (1 - DECAY) * state[name]
    return average


def _saved(run_dir: Path) -> dict[str, torch.Tensor]:
    state = read_checkpoint(list_checkpoints(run_dir / "checkpoints")[-1])
    return {
        f"model/{name.removeprefix('optimizer/').removesuffix('/ema')}": value
        for name, value in state.items()
        if name.endswith("/ema")
    }


@pytest.fixture(scope="module")
def run(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A run in one process, with its metrics."""
    folder = tmp_path_factory.mktemp("ema")
    more = ["export.enabled=true", "export.dtype=fp32", "data.eval=unused.json"]
    config = make_config(tiny_model_dir, folder, *SETTINGS, *more)
    plan = make_plan(config, ROWS)
    return folder, run_in_process(config, ROWS, evaluation=lambda: list(ROWS.stream(plan, 1))[:3])


def test_it_is_the_average_of_the_weights_of_all_steps(run: Any, tiny_model_dir: Path) -> None:
    expected, found = _averages(tiny_model_dir, run[0]), _saved(run[0])
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7)


def test_evaluation_and_export_use_it(run: Any, tiny_model_dir: Path) -> None:
    folder, lines = run
    exported = load_file(folder / "export" / "model.safetensors")
    average = _averages(tiny_model_dir, folder)
    weights = read_checkpoint(list_checkpoints(folder / "checkpoints")[-1])
    for name, tensor in exported.items():
        torch.testing.assert_close(tensor, average[f"model/{name}"], rtol=1e-5, atol=1e-7)
        assert not torch.allclose(tensor, weights[f"model/{name}"], rtol=1e-4, atol=1e-6)
    module = LossModule(load_model(ModelSection(path=str(folder / "export")), torch.device("cpu"))).eval()
    plan = make_plan(make_config(tiny_model_dir, folder), ROWS)
    batches = [to_batch(part) for part in list(ROWS.stream(plan, 1))[:3]]
    with torch.no_grad():
        loss = sum(float(module(batch)) for batch in batches) / sum(batch.loss_tokens for batch in batches)
    assert next(line["eval/loss"] for line in lines if "eval/loss" in line) == pytest.approx(loss, rel=1e-5)


def test_training_takes_the_same_steps_with_it(run: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    plain = run_in_process(make_config(tiny_model_dir, tmp_path), ROWS)
    assert [line["train/loss"] for line in run[1] if "train/loss" in line] == [line["train/loss"] for line in plain]


def test_resuming_is_bit_for_bit(run: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    config = make_config(tiny_model_dir, tmp_path, *SETTINGS)
    run_in_process(config, ROWS, stop_after=2)
    run_in_process(config, ROWS, start_from=tmp_path / "checkpoints" / "step-00000002", start=2)
    expected = _saved(run[0])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in _saved(tmp_path).items())


@pytest.fixture(scope="module")
def pool() -> Iterator[Ranks]:
    with ranks(2) as found:
        yield found


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_average_alike(pool: Ranks, run: Any, tiny_model_dir: Path, tmp_path: Path, strategy: str) -> None:
    more = [f"training.strategy={strategy}", "cluster.num_workers=2", "data.eval=unused.json"]
    export = ["export.enabled=true", "export.dtype=fp32"]
    config = make_config(tiny_model_dir, tmp_path, *SETTINGS, *more, *export)
    pool.run(2, train_rank, config, ROWS)
    expected = _saved(run[0])
    for name, tensor in _saved(tmp_path).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-4)
    exported = load_file(tmp_path / "export" / "model.safetensors")
    for name, tensor in exported.items():
        np.testing.assert_array_equal(tensor, _saved(tmp_path)[f"model/{name}"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.method=lisa", "excludes training.method=lisa"),
        ("training.strategy=deepspeed", "excludes training.strategy=deepspeed"),
    ],
)
def test_what_it_does_not_go_with_is_refused(tiny_model_dir: Path, tmp_path: Path, setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(tiny_model_dir, tmp_path, "training.ema_decay=0.9", setting)
