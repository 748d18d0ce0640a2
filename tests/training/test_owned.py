"""Optimizers that need whole weights where ranks hold ranges of them."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raylm.config.training import OptimizerSection
from raylm.training.checkpoint import newest_checkpoint
from tests.training.cells import LISA, STRATEGIES, config_of, losses, strategy_of
from tests.training.ranks import Ranks, ranks, train_rank
from tests.training.support import Rows, make_config, read_checkpoint, run_in_process

SLOW = pytest.mark.slow
SHAPES = {
    "embed.weight": (11, 3),
    "layers.0.w.weight": (5, 7),
    "layers.0.norm.weight": (7,),
    "layers.1.w.weight": (4, 4),
}
ZERO_2, ZERO_3, FSDP = (list(STRATEGIES[name]) for name in ("zero-2", "zero-3", "fsdp 2"))
OFFLOADED = ["deepspeed.offload_optimizer=true"]


@pytest.fixture(scope="module")
def pool() -> Iterator[Ranks]:
    with ranks(3) as found:
        yield found


def _tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def _cuts(world_size: int) -> dict[str, list[tuple[int, int]]]:
    """Ranges of each rank: uneven, and of some ranks empty."""
    cuts = {}
    for number, name in enumerate(SHAPES):
        size = int(np.prod(SHAPES[name]))
        ends = sorted(np.random.default_rng(number).integers(0, size + 1, world_size - 1).tolist())
        ends = [0, *ends, size] if number else [0, 0, size // 3, size]
        cuts[name] = [(start, end - start) for start, end in itertools.pairwise(ends)]
    return cuts


def _step_cut(rank: int, world_size: int, optimizer_name: str, bucket_elements: int) -> Any:
    """Four steps over cut tensors: one rests in the third; new weights, pieces of state, elements held."""
    from raylm.optim.build import build_optimizer
    from raylm.training.strategies import owned

    owned.BUCKET_ELEMENTS = bucket_elements
    section = OptimizerSection(name=optimizer_name, learning_rate=0.1, weight_decay=0.1)
    device = torch.device("cpu")
    shapes = {name: torch.Size(shape) for name, shape in SHAPES.items()}
    optimizer = owned.OwnedOptimizer(shapes, lambda named: build_optimizer(named, section), place=device, device=device)
    mine = {name: ranges[rank] for name, ranges in _cuts(world_size).items()}
    optimizer.lay_out(mine)
    weights = {name: value.flatten().narrow(0, *mine[name]).clone() for name, value in _tensors(0).items()}
    for step in range(1, 5):
        parts = {
            name: owned.Part(weights[name], gradient.flatten().narrow(0, *mine[name]))
            for name, gradient in _tensors(step).items()
            if not (step == 3 and name == "layers.0.w.weight")
        }
        optimizer.step(parts, [0.1 / step] * optimizer.num_groups)
    held = {name: piece.values.clone() for name, piece in optimizer.pieces().items()}
    return weights, held, optimizer.num_elements()


@pytest.mark.parametrize(
    ("optimizer_name", "bucket_elements"), [("lamb", 1), ("soap", 40), ("adamw_8bit", 40), ("galore", 10_000)]
)
def test_cut_weights_are_stepped_as_whole_ones(pool: Ranks, optimizer_name: str, bucket_elements: int) -> None:
    """Three ranks, uneven and empty ranges, one or several buckets; state lies on one rank each, evenly."""
    from raylm.optim.build import build_optimizer

    section = OptimizerSection(name=optimizer_name, learning_rate=0.1, weight_decay=0.1)
    named = [(name, torch.nn.Parameter(value)) for name, value in _tensors(0).items()]
    single = build_optimizer(named, section)
    for step in range(1, 5):
        for group in single.param_groups:
            group["lr"] = 0.1 / step
        for name, parameter in named:
            parameter.grad = None if step == 3 and name == "layers.0.w.weight" else _tensors(step)[name]
        single.step()
    results = pool.run(3, _step_cut, optimizer_name, bucket_elements)
    states = [name for _, held, _ in results for name in held]
    assert len(states) == len(set(states))
    for name, parameter in named:
        found = torch.cat([weights[name] for weights, _, _ in results])
        assert torch.equal(found, parameter.detach().flatten()), name
        for key, value in single.state[parameter].items():
            held = next(held[f"optimizer/{name}/{key}"] for _, held, _ in results if f"optimizer/{name}/{key}" in held)
            assert torch.equal(held, torch.as_tensor(value)), (name, key)
    if optimizer_name == "lamb":
        sizes = [size for _, _, size in results]
        assert max(sizes) - min(sizes) <= 2 * 35


def test_owners_share_the_elements_and_those_of_a_block() -> None:
    from raylm.training.strategies.owned import owners_of

    sizes = {"embed": 500, **{f"layers.{block}.{part}": 10 for block in range(30) for part in range(10)}}
    owners = owners_of(sizes, 4)
    loads = [sum(sizes[name] for name, owner in owners.items() if owner == rank) for rank in range(4)]
    assert max(loads) - min(loads) <= 500
    assert max(loads[1:]) - min(loads[1:]) <= 10
    assert {owners[f"layers.7.{part}"] for part in range(10)} == {1, 2, 3}


def _held(rank: int, world_size: int, model: str, settings: list[str]) -> tuple[int, int]:
    from raylm.training.batch import batch_of
    from raylm.training.loop import train_step

    strategy = strategy_of(config_of(model, "lamb", settings), world_size)
    train_step(
        strategy,
        [batch_of([np.arange(9, dtype=np.int32)], [np.ones(9, bool)])],
        max_grad_norm=1.0,
        precision="fp32",
        step=1,
    )
    assert not any(strategy.optimizer.state.values())
    return strategy._owned.num_elements(), sum(shape.numel() for shape in strategy._owned._shapes.values())


@pytest.mark.parametrize("settings", [FSDP, pytest.param(ZERO_3, marks=SLOW)], ids=["fsdp", "zero-3"])
def test_a_rank_keeps_the_state_of_what_it_owns_only(pool: Ranks, tiny_model_dir: Path, settings: list[str]) -> None:
    for held, whole in pool.run(2, _held, str(tiny_model_dir), settings):
        assert held == pytest.approx(2 * whole / 2, rel=0.1)


def _same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=1e-4, atol=1e-4, msg=lambda text, name=name: name + text)


def _state(run_dir: Path) -> dict[str, torch.Tensor]:
    newest = newest_checkpoint(run_dir / "checkpoints")
    assert newest is not None
    return read_checkpoint(newest)


ROWS = Rows(32)
RUN = ["optimizer.name=lamb", "optimizer.learning_rate=1e-2", "schedule.name=constant", "training.num_epochs=4"]
LONG_WAY = [(FSDP, 2, 2), (ZERO_3, 2, 4), (FSDP, 3, 6), (ZERO_2, 2, 8), (ZERO_3, 3, 10), ([], 1, None)]
SHORT_WAY = [(FSDP, 2, 2), (FSDP, 3, 5), ([], 1, None)]


@pytest.mark.parametrize(
    ("way", "method"),
    [(SHORT_WAY, []), pytest.param(LONG_WAY, [], marks=SLOW), pytest.param(LONG_WAY, [*LISA], marks=SLOW)],
    ids=["short", "long", "lisa"],
)
def test_a_checkpoint_goes_on_with_other_strategies_and_ranks(
    pool: Ranks, tiny_model_dir: Path, tmp_path: Path, way: list[Any], method: list[str]
) -> None:
    lines: list[dict[str, Any]] = []
    for strategy, world_size, until in way:
        workers = f"cluster.num_workers={[1, world_size] if world_size > 1 else 1}"
        stop = [f"training.max_steps={until}"] if until else []
        config = make_config(tiny_model_dir, tmp_path / "moved", *RUN, *method, *strategy, workers, *stop)
        newest = newest_checkpoint(tmp_path / "moved" / "checkpoints")
        start = int(newest.name.removeprefix("step-")) if newest else 0
        if world_size == 1:
            lines = run_in_process(config, ROWS, start_from=newest, start=start)
        else:
            lines = pool.run(world_size, train_rank, config, ROWS, start, newest)[0]
    expected = run_in_process(make_config(tiny_model_dir, tmp_path / "one", *RUN, *method), ROWS)
    assert [line["train/loss"] for line in lines] == pytest.approx([line["train/loss"] for line in expected], rel=1e-5)
    _same(_state(tmp_path / "moved"), _state(tmp_path / "one"))


@pytest.mark.parametrize(
    ("strategy", "name", "more"),
    [
        (FSDP, "lamb", ["training.ema_decay=0.9"]),
        pytest.param(FSDP, "came", [*LISA, "lisa.keep_state=true"], marks=SLOW),
        pytest.param(ZERO_3, "muon", [], marks=SLOW),
        pytest.param(ZERO_3, "adafactor", [*LISA], marks=SLOW),
        pytest.param(ZERO_2, "sophia", ["optimizer.options={hessian_interval_steps: 2}"], marks=SLOW),
        pytest.param(ZERO_3, "lamb", OFFLOADED, marks=SLOW),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(part.rpartition(".")[2] for part in value),
)
def test_resuming_is_bit_for_bit_and_the_steps_are_those_of_one_process(
    pool: Ranks, tiny_model_dir: Path, tmp_path: Path, strategy: list[str], name: str, more: list[str]
) -> None:
    """Two micro-batches a rank and step; weights and state at the end too."""
    settings = [*RUN, f"optimizer.name={name}", "optimizer.learning_rate=1e-3", *more]
    saved = [*strategy, "checkpoint.interval_steps=5", "checkpoint.keep_last=9"]
    config = make_config(tiny_model_dir, tmp_path / "two", *settings, *saved)
    first = pool.run(2, train_rank, config, ROWS)[0]
    state = _state(tmp_path / "two")
    again = pool.run(2, train_rank, config, ROWS, 5, tmp_path / "two" / "checkpoints" / "step-00000005")[0]
    assert [line["train/loss"] for line in again] == [line["train/loss"] for line in first]
    assert all(torch.equal(value, state[key]) for key, value in _state(tmp_path / "two").items())
    alone_settings = [part for part in settings if not part.startswith("deepspeed.")]
    alone = run_in_process(make_config(tiny_model_dir, tmp_path / "one", *alone_settings), ROWS)
    curves = [[(line["train/loss"], line["train/grad_norm"]) for line in lines] for lines in (first, alone)]
    np.testing.assert_allclose(*curves, rtol=1e-4)
    _same(state, _state(tmp_path / "one"))


@SLOW
@pytest.mark.parametrize("settings", [[*ZERO_2, *OFFLOADED], [*ZERO_3, *OFFLOADED, "deepspeed.offload_param=true"]])
def test_offloaded_optimizers_step_alike(pool: Ranks, tiny_model_dir: Path, settings: list[str]) -> None:
    names = ["lamb", "muon", "sophia"]
    expected = losses(0, 1, str(tiny_model_dir), (), names, 8)
    for found in pool.run(2, losses, str(tiny_model_dir), settings, names, 8):
        for name in names:
            assert found[name] == pytest.approx(expected[name], rel=1e-4), name


def _overflowing(rank: int, world_size: int, model: str, settings: list[str]) -> int:
    """An estimate from a loss that is not finite; elements of state afterwards."""
    from raylm.training.batch import batch_of
    from raylm.training.curvature import estimate_hessian
    from raylm.training.loop import train_step
    from raylm.training.scaling import LossScaler

    strategy = strategy_of(config_of(model, "sophia", settings), world_size)
    batch = batch_of([np.arange(9, dtype=np.int32)], [np.ones(9, bool)])
    estimate_hessian(strategy, [batch], precision="fp32", seed=1, scaler=LossScaler(initial=1e39))
    held = sum(piece.values.numel() for key, piece in strategy.pieces().items() if key.startswith("optimizer/"))
    train_step(strategy, [batch], max_grad_norm=1.0, precision="fp32", step=1)
    return held


@SLOW
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_zero_leaves_out_estimates_that_are_not_finite(pool: Ranks, tiny_model_dir: Path, stage: int) -> None:
    settings = [*ZERO_3, f"deepspeed.stage={stage}"]
    assert pool.run(2, _overflowing, str(tiny_model_dir), settings) == [0, 0]
