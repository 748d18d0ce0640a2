"""Optimizers on two ranks against one process: what works is the same, the rest is refused before the start."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from raylm.errors import ConfigError
from raylm.optim.checks import check_optimizer_use
from raylm.optim.table import OPTIMIZERS, excluded_strategies
from tests.training.ranks import Ranks, ranks, train_rank
from tests.training.support import Rows, make_config, run_in_process

STEPS = 6
ROWS = Rows()
BY_KIND = ("adabelief", "adagrad", "lion", "nadam", "sgd", "adabound")
"""Counted by `counted`, made late by us, without a count, counted twice by torch, of a momentum only, with a rate of
the group: one each, for CI."""


@pytest.fixture(scope="module")
def pool() -> Iterator[Ranks]:
    with ranks(2) as found:
        yield found


def _works(strategy: str) -> list[str]:
    return [name for name, row in OPTIMIZERS.items() if strategy not in excluded_strategies(row)]


def _losses(rank: int, world_size: int, model_dir: str, strategy: str, stage: int, names: list[str]) -> Any:
    """Losses of every step for every optimizer. Each rank has its half of the rows."""
    from raylm.config.deepspeed import deepspeed_config
    from raylm.config.sections import ModelSection
    from raylm.config.training import FsdpSection
    from raylm.models.load import load_model
    from raylm.optim.build import build_optimizer
    from raylm.training.batch import batch_of
    from raylm.training.loop import train_step
    from raylm.training.module import LossModule
    from raylm.training.strategies.table import strategy_class

    device = torch.device("cpu")
    rows = [(Rows().ids[number], Rows().masks[number]) for number in range(4)]
    mine = rows[rank::world_size]
    found = {}
    for name in names:
        rate = OPTIMIZERS[name].learning_rates[1]
        settings = [f"optimizer.name={name}", f"optimizer.learning_rate={rate}", "optimizer.weight_decay=0.1"]
        section: Any = FsdpSection() if strategy == "fsdp" else None
        config = make_config(Path(model_dir), Path("unused"), *settings)
        if strategy == "deepspeed":
            more = ["training.strategy=deepspeed", f"deepspeed.stage={stage}", f"cluster.num_workers={world_size}"]
            config = make_config(Path(model_dir), Path("unused"), *settings, *more)
            section = deepspeed_config(config, hidden_size=32, world_size=world_size)
        module = LossModule(load_model(ModelSection(path=model_dir), device))
        optimizer = config.optimizer
        build = lambda named, optimizer=optimizer: build_optimizer(named, optimizer)  # noqa: E731
        runner = strategy_class(strategy)(module, build, device, section)
        batches = [batch_of([ids], [mask]) for ids, mask in mine]
        found[name] = [
            train_step(runner, batches, max_grad_norm=1.0, precision="fp32", step=step + 1)[0] for step in range(STEPS)
        ]
    return found


def _compare(pool: Ranks, model: Path, strategy: str, stage: int, names: list[str]) -> None:
    expected = _losses(0, 1, str(model), "single", 0, names)
    for found in pool.run(2, _losses, str(model), strategy, stage, names):
        for name in names:
            assert found[name] == pytest.approx(expected[name], rel=1e-4), name
            assert expected[name][-1] < expected[name][0], f"{name} learns nothing"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_every_optimizer_that_is_allowed_steps_as_in_one_process(
    pool: Ranks, tiny_model_dir: Path, strategy: str
) -> None:
    _compare(pool, tiny_model_dir, strategy, 0, _works(strategy))


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_each_kind_steps_as_in_one_process(pool: Ranks, tiny_model_dir: Path, strategy: str) -> None:
    _compare(pool, tiny_model_dir, strategy, 3, list(BY_KIND))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_steps_every_allowed_one_as_in_one_process(pool: Ranks, tiny_model_dir: Path, stage: int) -> None:
    _compare(pool, tiny_model_dir, "deepspeed", stage, _works("deepspeed"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        (name, strategy)
        for strategy in ("fsdp", "deepspeed")
        for name in (*BY_KIND, "sophia", "yogi")
        if strategy not in excluded_strategies(OPTIMIZERS[name])
    ],
)
def test_lisa_steps_each_kind_as_in_one_process(
    pool: Ranks, tiny_model_dir: Path, tmp_path: Path, name: str, strategy: str
) -> None:
    """Blocks that wake have no state, and a count of their own."""
    settings = [f"optimizer.name={name}", "optimizer.learning_rate=1e-3", "training.num_epochs=4"]
    settings += ["training.method=lisa", "lisa.num_active_layers=1", "lisa.interval_steps=2"]
    settings += ["optimizer.options={hessian_interval_steps: 2}"] if OPTIMIZERS[name].estimates else []
    alone = run_in_process(make_config(tiny_model_dir, tmp_path / "one", *settings), ROWS)
    more = [f"training.strategy={strategy}", "cluster.num_workers=2"]
    lines = pool.run(2, train_rank, make_config(tiny_model_dir, tmp_path / "two", *settings, *more), ROWS)[0]
    assert [line["train/loss"] for line in lines] == pytest.approx([line["train/loss"] for line in alone], rel=1e-4)


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


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
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


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed"])
def test_what_takes_whole_weights_is_refused_where_they_are_cut(
    tiny_model_dir: Path, tmp_path: Path, strategy: str
) -> None:
    for name, row in OPTIMIZERS.items():
        settings = [f"optimizer.name={name}", "schedule.name=constant", f"training.strategy={strategy}"]
        config = make_config(tiny_model_dir, tmp_path, *settings)
        if row.whole:
            with pytest.raises(ConfigError, match=f"{name} excludes training.strategy={strategy}.*single or ddp, or"):
                check_optimizer_use(config)
        elif not ((row.averages or row.estimates) and strategy == "deepspeed"):
            check_optimizer_use(config)
