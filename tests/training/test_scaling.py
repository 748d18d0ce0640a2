"""Loss scaling against torch.amp.GradScaler on the CPU, whose autocast does fp16 too."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raylm.config.sections import ModelSection
from raylm.config.training import FsdpSection, OptimizerSection
from raylm.errors import ConfigError, TrainingError
from raylm.models.load import load_model
from raylm.optim.build import build_optimizer
from raylm.training.batch import Batch, batch_of
from raylm.training.hardware import resolve_precision
from raylm.training.loop import train_step
from raylm.training.module import LossModule
from raylm.training.scaling import LossScaler
from raylm.training.strategies.single import SingleStrategy
from raylm.training.strategies.table import strategy_class
from tests.training.ranks import Ranks, ranks
from tests.training.support import make_config, whole_state

CPU = torch.device("cpu")
OPTIMIZER = OptimizerSection(learning_rate=1e-2)
STEPS, INTERVAL, INITIAL = 14, 4, 2.0**24


def _batch(step: int) -> Batch:
    ids = np.random.default_rng(step).integers(3, 200, 20).astype(np.int32)
    return batch_of([ids], [np.ones(20, bool)])


def _module(folder: Path) -> LossModule:
    return LossModule(load_model(ModelSection(path=str(folder)), CPU))


def _run(strategy: Any, scaler: LossScaler, steps: range) -> list[tuple[float, int]]:
    """The scale after each step, and the overflows so far."""
    found = []
    for step in steps:
        micro_batches = [_batch(2 * step + number) for number in range(strategy.rank, 2, strategy.world_size)]
        train_step(strategy, micro_batches, max_grad_norm=0.5, precision="fp16", step=step, scaler=scaler)
        found.append((scaler.scale, scaler.overflows))
    return found


def _single(folder: Path) -> SingleStrategy:
    return SingleStrategy(_module(folder), lambda named: build_optimizer(named, OPTIMIZER), CPU)


def _scaler() -> LossScaler:
    return LossScaler(initial=INITIAL, growth_interval=INTERVAL)


def _reference(folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The loop of torch's documentation: unscale, clip, step, update."""
    module = _module(folder).train()
    optimizer = build_optimizer(module.trainable(), OPTIMIZER)
    scaler = torch.amp.GradScaler("cpu", init_scale=INITIAL, growth_interval=INTERVAL)
    scales = []
    for step in range(STEPS):
        batches = [_batch(2 * step + number) for number in range(2)]
        for batch in batches:
            with torch.autocast("cpu", torch.float16):
                loss = module(batch)
            scaler.scale(loss / sum(each.loss_tokens for each in batches)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return scales, dict(module.trainable())


def test_it_is_torchs_scaler(tiny_model_dir: Path) -> None:
    """Steps passed over, the scale after each, and the weights; then the same in two halves, bit for bit."""
    scales, weights = _reference(tiny_model_dir)
    strategy = _single(tiny_model_dir)
    found = _run(strategy, _scaler(), range(STEPS))
    assert [scale for scale, _ in found] == scales
    assert found[-1][1] == sum(after < before for before, after in pairwise([INITIAL, *scales])) > 2
    assert any(after > before for before, after in pairwise(scales)), "it grows again"
    for name, parameter in strategy.module.trainable():
        assert torch.equal(parameter, weights[name])
    half, first = _single(tiny_model_dir), _scaler()
    _run(half, first, range(5))
    again, second = _single(tiny_model_dir), _scaler()
    again.load_state({**whole_state(half), **first.state()})
    second.load_state(first.state())
    assert _run(again, second, range(5, STEPS)) == found[5:]
    assert all(torch.equal(p, dict(strategy.module.trainable())[name]) for name, p in again.module.trainable())


@pytest.fixture(scope="module")
def pool() -> Iterator[Ranks]:
    with ranks(2) as found:
        yield found


@pytest.mark.parametrize(("name", "more"), [("ddp", 2), ("fsdp", 1)])
def test_ranks_agree_on_the_steps_they_pass_over(pool: Ranks, tiny_model_dir: Path, name: str, more: int) -> None:
    """DDP takes the mean over ranks, so its gradients are larger by their number on the way."""
    expected = _run(_single(tiny_model_dir), _scaler(), range(STEPS))
    assert pool.run(2, _rank, str(tiny_model_dir), name, more) == [expected, expected]


def _rank(rank: int, world_size: int, folder: str, name: str, more: int) -> list[tuple[float, int]]:
    section = FsdpSection() if name == "fsdp" else None
    build = lambda named: build_optimizer(named, OPTIMIZER)  # noqa: E731
    strategy = strategy_class(name)(_module(Path(folder)), build, CPU, section)
    scaler = LossScaler(initial=INITIAL / more, growth_interval=INTERVAL)
    return [(scale * more, overflows) for scale, overflows in _run(strategy, scaler, range(STEPS))]


def test_gradients_that_are_never_finite_stop_the_run(tiny_model_dir: Path) -> None:
    strategy, scaler = _single(tiny_model_dir), LossScaler(initial=4.0)
    weight = strategy.module.trainable()[0][1]
    weight.register_hook(lambda grad: grad * float("inf"))
    before = weight.detach().clone()
    with pytest.raises(TrainingError, match="step 2: the gradients are not finite at any loss scale"):
        _run(strategy, scaler, range(5))
    assert torch.equal(weight, before)


def test_fp16_is_refused_where_it_cannot_be(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fp16 is for GPUs"):
        resolve_precision("fp16", CPU)
    for setting in ("cluster.use_gpu=false", "training.strategy=deepspeed"):
        with pytest.raises(ConfigError, match=f"training.precision=fp16 excludes {setting}"):
            make_config(tiny_model_dir, tmp_path, "training.precision=fp16", setting)
