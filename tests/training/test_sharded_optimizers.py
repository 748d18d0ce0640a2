"""Optimizers on two ranks against one process: one of each kind, averages and estimates."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.training.cells import LISA, STRATEGIES, losses
from tests.training.ranks import Ranks, ranks, train_rank
from tests.training.support import Rows, make_config, run_in_process

STEPS = 5
ROWS = Rows()
BY_KIND = ("adabelief", "adagrad", "lion", "nadam", "sgd", "adabound", "lamb", "muon", "adafactor")
"""Counted by `counted`, made late by us, without a count, counted twice by torch, of a momentum only, with a rate of
the group; of whole weights with state of their shape, of two inner optimizers, and of vectors: one each, for CI. The
rest is in test_optimizer_matrix.py."""


@pytest.fixture(scope="module")
def pool() -> Iterator[Ranks]:
    with ranks(2) as found:
        yield found


@pytest.mark.parametrize(("cell", "names"), [("fsdp 2", BY_KIND), ("zero-2", ("lamb", "sophia"))])
def test_each_kind_steps_as_in_one_process(
    pool: Ranks, tiny_model_dir: Path, cell: str, names: tuple[str, ...]
) -> None:
    expected = losses(0, 1, str(tiny_model_dir), (), names, STEPS)
    for found in pool.run(2, losses, str(tiny_model_dir), STRATEGIES[cell], names, STEPS):
        for name in names:
            assert found[name] == pytest.approx(expected[name], rel=1e-4), name
            assert expected[name][-1] < expected[name][0], f"{name} learns nothing"


@pytest.mark.slow
@pytest.mark.parametrize("name", [*BY_KIND, "sophia", "yogi"])
def test_lisa_on_zero_steps_each_kind_as_in_one_process(pool: Ranks, tiny_model_dir: Path, name: str) -> None:
    """Blocks that wake have no state, and a count of their own."""
    expected = losses(0, 1, str(tiny_model_dir), LISA, [name])[name]
    for found in pool.run(2, losses, str(tiny_model_dir), [*STRATEGIES["zero-3"], *LISA], [name]):
        assert found[name] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_schedule_free_averages_alike(pool: Ranks, tiny_model_dir: Path, tmp_path: Path, strategy: str) -> None:
    settings = ["optimizer.name=schedulefree_adamw", "schedule.name=constant", "export.enabled=true"]
    settings += ["export.dtype=fp32"]
    alone = run_in_process(make_config(tiny_model_dir, tmp_path / "one", *settings), ROWS)
    settings += [f"training.strategy={strategy}", "cluster.num_workers=2"]
    settings += ["training.eval_interval_steps=2", "data.eval=unused.json"]
    lines = pool.run(2, train_rank, make_config(tiny_model_dir, tmp_path / "two", *settings), ROWS)[0]
    expected = [line["train/loss"] for line in alone]
    assert [line["train/loss"] for line in lines if "train/loss" in line] == pytest.approx(expected, rel=1e-4)
    exported = load_file(tmp_path / "two" / "export" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "one" / "export" / "model.safetensors").items():
        np.testing.assert_allclose(exported[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "strategy", ["fsdp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "deepspeed"))]
)
def test_sophia_estimates_alike(pool: Ranks, tiny_model_dir: Path, tmp_path: Path, strategy: str) -> None:
    """Draws depend on rows, not on ranks."""
    settings = [
        "optimizer.name=sophia",
        "optimizer.learning_rate=1e-3",
        "optimizer.options={hessian_interval_steps: 2}",
    ]
    alone = run_in_process(make_config(tiny_model_dir, tmp_path / "one", *settings), ROWS)
    settings += [f"training.strategy={strategy}", "cluster.num_workers=2"]
    lines = pool.run(2, train_rank, make_config(tiny_model_dir, tmp_path / "two", *settings), ROWS)[0]
    expected = [line["train/loss"] for line in alone]
    assert expected[-1] < expected[0]
    assert [line["train/loss"] for line in lines] == pytest.approx(expected, rel=1e-4)
