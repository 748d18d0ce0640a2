"""Schedule-free optimizers: evaluation and export use averaged weights, checkpoints what training goes on from."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raylm.config.sections import ModelSection
from raylm.errors import ConfigError
from raylm.models.load import load_model
from raylm.optim.checks import check_optimizer_use
from raylm.training.batch import to_batch
from raylm.training.checkpoint import list_checkpoints
from raylm.training.module import LossModule
from tests.training.support import Rows, make_config, make_plan, read_checkpoint, run_in_process

ROWS = Rows()
SETTINGS = (
    "optimizer.name=schedulefree_adamw",
    "schedule.name=constant",
    "schedule.warmup_steps=3",
    "checkpoint.interval_steps=1",
    "checkpoint.keep_last=99",
)
EXPORT = ("export.enabled=true", "export.dtype=fp32", "data.eval=unused.json")


def _averages(run_dir: Path) -> dict[str, torch.Tensor]:
    """From the iterates z after each step, weighted with the square of the highest rate so far (1/3, 2/3, 1, 1 …)."""
    states = [read_checkpoint(path) for path in list_checkpoints(run_dir / "checkpoints")]
    weights = [min((step + 1) / 3, 1.0) ** 2 for step in range(len(states))]
    names = [name.removesuffix("/z").removeprefix("optimizer/") for name in states[0] if name.endswith("/z")]
    return {
        name: sum(w * state[f"optimizer/{name}/z"].double() for w, state in zip(weights, states, strict=True)).float()
        / sum(weights)
        for name in names
    }


@pytest.fixture(scope="module")
def run(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A run in one process that evaluates after every second step."""
    folder = tmp_path_factory.mktemp("free")
    config = make_config(tiny_model_dir, folder, *SETTINGS, *EXPORT, "training.eval_interval_steps=2")
    plan = make_plan(config, ROWS)
    return folder, run_in_process(config, ROWS, evaluation=lambda: list(ROWS.stream(plan, 1))[:3])


def test_evaluation_and_export_use_the_averages(run: Any, tiny_model_dir: Path) -> None:
    folder, lines = run
    exported, averages = load_file(folder / "export" / "model.safetensors"), _averages(folder)
    trained = read_checkpoint(list_checkpoints(folder / "checkpoints")[-1])
    assert exported.keys() == averages.keys()
    for name, tensor in exported.items():
        torch.testing.assert_close(tensor, averages[name], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(tensor, trained[f"model/{name}"], rtol=1e-4, atol=1e-5)
    module = LossModule(load_model(ModelSection(path=str(folder / "export")), torch.device("cpu"))).eval()
    batches = [
        to_batch(part) for part in list(ROWS.stream(make_plan(make_config(tiny_model_dir, folder), ROWS), 1))[:3]
    ]
    with torch.no_grad():
        loss = sum(float(module(batch)) for batch in batches) / sum(batch.loss_tokens for batch in batches)
    assert [line["eval/loss"] for line in lines if "eval/loss" in line][-1] == pytest.approx(loss, rel=1e-5)


def test_evaluation_leaves_every_bit_of_the_training(run: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    plain = run_in_process(make_config(tiny_model_dir, tmp_path, *SETTINGS), ROWS)
    assert [line["train/loss"] for line in run[1] if "train/loss" in line] == [line["train/loss"] for line in plain]
    _same_end(run[0], tmp_path)


def test_resuming_is_bit_for_bit(run: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    config = make_config(tiny_model_dir, tmp_path, *SETTINGS)
    run_in_process(config, ROWS, stop_after=2)
    run_in_process(config, ROWS, start_from=tmp_path / "checkpoints" / "step-00000002", start=2)
    _same_end(run[0], tmp_path)


def _same_end(left: Path, right: Path) -> None:
    expected, found = (read_checkpoint(list_checkpoints(folder / "checkpoints")[-1]) for folder in (left, right))
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["training.method=lisa"], "excludes training.method=lisa"),
        (["training.strategy=deepspeed"], "excludes training.strategy=deepspeed.*single or ddp or fsdp"),
        (["training.ema_decay=0.9"], "excludes training.ema_decay"),
        (["schedule.name=cosine"], "excludes schedule.name=cosine.*Set schedule.name=constant"),
    ],
)
def test_what_it_does_not_go_with_is_refused(
    tiny_model_dir: Path, tmp_path: Path, settings: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_optimizer_use(make_config(tiny_model_dir, tmp_path, *SETTINGS, *settings))
