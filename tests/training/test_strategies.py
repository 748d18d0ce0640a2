"""The equivalence class of strategies: however ranks share the work, the same steps."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from raylm.errors import ConfigError
from raylm.models.vocabulary import NEW_ROWS
from raylm.training.checkpoint import newest_checkpoint
from tests.tiny import build_tiny_model
from tests.training.ranks import Ranks, ranks, train_rank
from tests.training.support import Rows, make_config, read_checkpoint, run_in_process

ROWS = Rows(60)
COMMON = ("training.num_epochs=5", "optimizer.learning_rate=1e-3", "optimizer.max_grad_norm=0.5")
METHODS = {
    "full": ["training.method=full"],
    "lora": ["training.method=lora"],
    "qlora": ["training.method=qlora"],
    "lisa": ["training.method=lisa", "lisa.num_active_layers=1", "lisa.interval_steps=4"],
}


METHODS["lisa-kept"] = [*METHODS["lisa"], "lisa.keep_state=true", "lisa.interval_steps=3"]


@pytest.fixture(scope="module")
def pool() -> Iterator[Ranks]:
    with ranks(4) as found:
        yield found


def _curve(lines: list[dict[str, Any]]) -> np.ndarray:
    return np.array([(line["train/loss"], line["train/grad_norm"]) for line in lines if "train/loss" in line])


def _state(run_dir: Path) -> dict[str, torch.Tensor]:
    newest = newest_checkpoint(run_dir / "checkpoints")
    assert newest is not None
    return read_checkpoint(newest)


def _assert_same_run(run: Path, lines: list[dict[str, Any]], reference: Path, expected: list[dict[str, Any]]) -> None:
    curve, wanted = _curve(lines), _curve(expected)
    assert len(wanted) >= 20
    np.testing.assert_allclose(curve, wanted, rtol=1e-5, atol=1e-5)
    drift = (curve - wanted).mean(0)
    assert np.all(np.abs(drift) < 2e-6), drift
    state, target = _state(run), _state(reference)
    assert state.keys() == target.keys()
    for name, tensor in target.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: name + text)


@pytest.fixture(scope="module")
def reference(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs in one process, by method."""
    folder = tmp_path_factory.mktemp("reference")
    done: dict[str, Any] = {}

    def get(method: str) -> tuple[Path, list[dict[str, Any]]]:
        if method not in done:
            config = make_config(tiny_model_dir, folder / method, *COMMON, *METHODS[method])
            done[method] = (folder / method, run_in_process(config, ROWS))
        return done[method]

    return get


SLOW = pytest.mark.slow
RANKS = [
    (2, ["training.strategy=ddp"]),
    (2, ["training.strategy=fsdp"]),
    (4, ["training.strategy=ddp"]),
    (4, ["training.strategy=fsdp"]),
    (2, ["training.strategy=fsdp", "fsdp.reshard_after_forward=false"]),
    (2, ["training.strategy=fsdp", "training.gradient_checkpointing=true"]),
    (3, ["training.strategy=ddp"]),
    (3, ["training.strategy=fsdp"]),
]


@pytest.mark.parametrize(
    ("world_size", "options", "method"),
    [
        pytest.param(*case, method, marks=[SLOW] if number > 1 and method != "full" else [])
        for number, case in enumerate(RANKS)
        for method in ("full", "lora", "lisa")
    ],
    ids=lambda value: "-".join(part.rpartition(".")[2] for part in value) if isinstance(value, list) else str(value),
)
def test_ranks_take_the_steps_of_one_process(
    pool: Ranks, reference: Any, tiny_model_dir: Path, tmp_path: Path, world_size: int, options: list[str], method: str
) -> None:
    """Uneven counts of labels a rank, accumulation, clipping and short last batches included; with three, as elastic
    runs have them, four micro-batches that do not divide by the ranks."""
    settings = [*COMMON, *options, *METHODS[method], f"cluster.num_workers=[1,{world_size}]"]
    config = make_config(tiny_model_dir, tmp_path, *settings)
    lines = pool.run(world_size, train_rank, config, ROWS)[0]
    _assert_same_run(tmp_path, lines, *reference(method))


@pytest.mark.parametrize("options", [["ddp"], ["fsdp", "training.gradient_checkpointing=true"]], ids="-".join)
def test_ranks_over_quantised_weights_take_the_steps_of_one_process(
    pool: Ranks, reference: Any, tiny_model_dir: Path, tmp_path: Path, options: list[str]
) -> None:
    """FSDP cuts packed weights too."""
    settings = [*COMMON, f"training.strategy={options[0]}", *options[1:], *METHODS["qlora"], "cluster.num_workers=2"]
    lines = pool.run(2, train_rank, make_config(tiny_model_dir, tmp_path, *settings), ROWS)[0]
    _assert_same_run(tmp_path, lines, *reference("qlora"))


def _zero(*options: str) -> list[str]:
    return ["training.strategy=deepspeed", *(f"deepspeed.{option}" for option in options)]


OFFLOADED = ["offload_optimizer=true", "offload_param=true"]


@pytest.mark.parametrize(
    ("world_size", "options", "method"),
    [
        (2, _zero("stage=3"), "full"),
        (2, _zero("stage=3"), "lora"),
        (2, _zero("stage=3"), "lisa"),
        (2, _zero("stage=2"), "full"),
        pytest.param(1, _zero("stage=3"), "full", marks=SLOW),
        pytest.param(3, _zero("stage=3"), "full", marks=SLOW),
        pytest.param(3, _zero("stage=2"), "lisa", marks=SLOW),
        pytest.param(2, _zero("stage=0"), "full", marks=SLOW),
        pytest.param(2, _zero("stage=0"), "lisa", marks=SLOW),
        pytest.param(2, _zero("stage=1"), "full", marks=SLOW),
        pytest.param(2, _zero("stage=1"), "lora", marks=SLOW),
        pytest.param(2, _zero("stage=1"), "lisa", marks=SLOW),
        pytest.param(2, _zero("stage=1"), "lisa-kept", marks=SLOW),
        pytest.param(2, _zero("stage=2"), "lora", marks=SLOW),
        pytest.param(2, _zero("stage=2"), "lisa", marks=SLOW),
        pytest.param(2, _zero("stage=3"), "lisa-kept", marks=SLOW),
        pytest.param(4, _zero("stage=3"), "full", marks=SLOW),
        pytest.param(4, _zero("stage=3"), "lora", marks=SLOW),
        pytest.param(4, _zero("stage=3"), "lisa", marks=SLOW),
        pytest.param(2, [*_zero("stage=3"), "training.gradient_checkpointing=true"], "full", marks=SLOW),
        pytest.param(2, [*_zero("stage=3"), "training.gradient_checkpointing=true"], "lora", marks=SLOW),
        pytest.param(2, [*_zero("stage=3"), "training.gradient_checkpointing=true"], "lisa", marks=SLOW),
        pytest.param(2, _zero("stage=3", *OFFLOADED), "full", marks=SLOW),
        pytest.param(2, _zero("stage=3", *OFFLOADED), "lisa", marks=SLOW),
        pytest.param(2, _zero("stage=2", "offload_optimizer=true"), "full", marks=SLOW),
        pytest.param(2, _zero("stage=1", "offload_optimizer=true"), "lisa", marks=SLOW),
    ],
    ids=lambda value: "-".join(part.rpartition(".")[2] for part in value) if isinstance(value, list) else str(value),
)
def test_zero_takes_the_steps_of_one_process(
    pool: Ranks, reference: Any, tiny_model_dir: Path, tmp_path: Path, world_size: int, options: list[str], method: str
) -> None:
    settings = [*COMMON, *options, *METHODS[method], f"cluster.num_workers=[1,{world_size}]"]
    config = make_config(tiny_model_dir, tmp_path, *settings)
    lines = pool.run(world_size, train_rank, config, ROWS)[0]
    _assert_same_run(tmp_path, lines, *reference(method))


@pytest.mark.slow
@pytest.mark.parametrize("method", [["full"], ["full", "training.precision=bf16"], ["new_rows"]], ids="-".join)
def test_zero_with_an_output_layer_of_its_own(pool: Ranks, tmp_path: Path, method: list[str]) -> None:
    """The loss reads its weight, and rows that are trained in it, outside the layer's own forward."""
    model = build_tiny_model(tmp_path / "model", tie_word_embeddings=False, **{NEW_ROWS: [200, 80]})
    found = []
    for number, strategy in enumerate([DDP, _zero("stage=3")]):
        settings = [*COMMON, *strategy, "cluster.num_workers=2", f"training.method={method[0]}", *method[1:]]
        lines = pool.run(2, train_rank, make_config(model, tmp_path / str(number), *settings), ROWS)[0]
        found.append((_curve(lines), _state(tmp_path / str(number))))
    (wanted, target), (curve, state) = found
    close = 2e-3 if "training.precision=bf16" in method else 1e-5
    np.testing.assert_allclose(curve, wanted, rtol=close, atol=close)
    assert state.keys() == target.keys()
    assert all(torch.allclose(state[name], target[name], rtol=0, atol=10 * close) for name in target)


FSDP, DDP, SINGLE = ["training.strategy=fsdp"], ["training.strategy=ddp"], ["training.strategy=single"]
WAYS = {
    "fsdp": [(FSDP, 4, 6), (FSDP, 2, 11), (DDP, 3, 16), (SINGLE, 1, None)],
    "to-zero": [(FSDP, 2, 4), (_zero("stage=3"), 2, 9), (_zero("stage=1"), 2, 13), (SINGLE, 1, None)],
    "zero": [(DDP, 2, 3), (_zero("stage=2"), 4, 7), (_zero("stage=3"), 4, 14), (_zero("stage=3"), 2, None)],
}
"""Strategies and numbers of ranks one after the other, each up to a step."""


@pytest.mark.parametrize("method", ["full", "lora", "lisa"])
@pytest.mark.parametrize("way", ["fsdp", pytest.param("to-zero", marks=SLOW), pytest.param("zero", marks=SLOW)])
def test_a_checkpoint_of_some_ranks_goes_on_with_others(
    pool: Ranks, tiny_model_dir: Path, tmp_path: Path, way: str, method: str
) -> None:
    options = [*COMMON, *METHODS[method]]
    lines: list[dict[str, Any]] = []
    for strategy, world_size, until in WAYS[way]:
        stop = [f"training.max_steps={until}"] if until else []
        settings = [*options, *stop, *strategy, f"cluster.num_workers={[1, world_size] if world_size > 1 else 1}"]
        # A shorter run would have a steeper schedule: a constant rate has none.
        config = make_config(tiny_model_dir, tmp_path, *settings, "schedule.name=constant")
        newest = newest_checkpoint(tmp_path / "checkpoints")
        start = int(newest.name.removeprefix("step-")) if newest else 0
        if world_size == 1:
            lines = run_in_process(config, ROWS, start_from=newest, start=start)
        else:
            lines = pool.run(world_size, train_rank, config, ROWS, start, newest)[0]
    whole = make_config(tiny_model_dir, tmp_path / "whole", *options, "schedule.name=constant")
    _assert_same_run(tmp_path, lines, tmp_path / "whole", run_in_process(whole, ROWS))


@pytest.mark.parametrize("strategy", [FSDP, _zero("stage=3"), pytest.param(_zero("stage=2"), marks=SLOW)], ids="-".join)
@pytest.mark.parametrize("method", [["lora", "lora.dropout=0.1"], ["lisa", "lisa.interval_steps=4"]], ids="-".join)
def test_resuming_is_bit_for_bit(
    pool: Ranks, tiny_model_dir: Path, tmp_path: Path, strategy: list[str], method: list[str]
) -> None:
    """Within an interval, for LISA."""
    settings = [*COMMON, *strategy, "cluster.num_workers=2", "checkpoint.interval_steps=7", "checkpoint.keep_last=9"]
    settings += [f"training.method={method[0]}", method[1]]
    whole = make_config(tiny_model_dir, tmp_path, *settings)
    first = pool.run(2, train_rank, whole, ROWS)[0]
    state = _state(tmp_path)
    again = pool.run(2, train_rank, whole, ROWS, 7, tmp_path / "checkpoints" / "step-00000007")[0]
    assert np.array_equal(_curve(again), _curve(first))
    assert all(torch.equal(tensor, state[name]) for name, tensor in _state(tmp_path).items())


def test_evaluation_with_unequal_numbers_of_batches(pool: Ranks, tiny_model_dir: Path, tmp_path: Path) -> None:
    """A rank of sharded weights that has fewer batches takes part in the others' forwards; DDP's ranks run alone. The
    checkpoint after it is whole."""
    found, states = [], []
    for number, strategy in enumerate([DDP, FSDP, _zero("stage=3")]):
        settings = [*strategy, "cluster.num_workers=2", "data.eval=unused.json", "training.eval_interval_steps=1"]
        config = make_config(tiny_model_dir, tmp_path / str(number), *settings, "training.max_steps=3")
        lines = pool.run(2, train_rank, config, ROWS)[0]
        found.append([(line["eval/loss"], line["eval/loss_tokens"]) for line in lines if "eval/loss" in line])
        states.append(_state(tmp_path / str(number)))
    assert len(found[0]) == 3
    assert states[0].keys() == states[1].keys() == states[2].keys()
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-5)


def test_a_rank_holds_its_part_only(pool: Ranks, tiny_model_dir: Path) -> None:
    shares = pool.run(2, _held, str(tiny_model_dir))
    for parameters, state, whole in shares:
        assert parameters == pytest.approx(whole / 2, rel=0.02)
        assert state == pytest.approx(2 * whole / 2, rel=0.02)


def _held(rank: int, world_size: int, model_dir: str) -> tuple[int, int, int]:
    """Elements of weights and optimizer state on this rank, and of the whole model."""
    from raylm.config.training import FsdpSection
    from raylm.training.strategies.fsdp import FsdpStrategy

    strategy = _stepped(model_dir, FsdpStrategy, FsdpSection())
    local = sum(parameter.to_local().numel() for _, parameter in strategy.module.trainable())
    states = [v for slots in strategy.optimizer.state.values() for v in slots.values() if v.ndim]
    whole = sum(parameter.numel() for _, parameter in strategy.module.trainable())
    return local, sum(value.to_local().numel() for value in states), whole


def _stepped(model_dir: str, kind: Any, section: Any) -> Any:
    from raylm.config.sections import ModelSection
    from raylm.config.training import OptimizerSection
    from raylm.models.load import load_model
    from raylm.optim.build import build_optimizer
    from raylm.training.batch import batch_of
    from raylm.training.loop import train_step
    from raylm.training.module import LossModule

    device = torch.device("cpu")
    module = LossModule(load_model(ModelSection(path=model_dir), device))
    strategy = kind(module, lambda named: build_optimizer(named, OptimizerSection()), device, section)
    batch = batch_of([np.arange(9, dtype=np.int32)], [np.ones(9, bool)])
    train_step(strategy, [batch], max_grad_norm=1.0, precision="fp32", step=1)
    return strategy


def test_a_rank_of_zero_holds_its_part_only(pool: Ranks, tiny_model_dir: Path) -> None:
    """But for norms: they are small enough to be kept."""
    for weights, masters, state, whole in pool.run(2, _held_by_zero, str(tiny_model_dir)):
        assert weights == pytest.approx(whole / 2, rel=0.02)
        assert masters == 0, "weights are stepped where they are"
        assert state == pytest.approx(2 * whole / 2, rel=0.02)


def _held_by_zero(rank: int, world_size: int, model_dir: str) -> tuple[int, int, int, int]:
    from raylm.config.deepspeed import deepspeed_config
    from raylm.training.strategies.deepspeed import DeepspeedStrategy

    settings = ["training.strategy=deepspeed", f"cluster.num_workers={world_size}", "training.global_batch_size=2"]
    config = make_config(Path(model_dir), Path("unused"), *settings)
    strategy = _stepped(model_dir, DeepspeedStrategy, deepspeed_config(config, hidden_size=32))
    zero = strategy._running.optimizer
    flats = zero.fp32_partitioned_groups_flat
    shared = {part.data_ptr() for part in zero.fp16_partitioned_groups_flat}
    parameters = [parameter for _, parameter in strategy.module.trainable()]
    return (
        sum(p.ds_tensor.numel() + (p.numel() if not p.ds_persist else 0) for p in parameters),
        sum(flat.numel() for flat in flats if flat.data_ptr() not in shared),
        sum(value.numel() for flat in flats for value in zero.optimizer.state[flat].values() if value.ndim),
        sum(p.ds_numel for p in parameters),
    )


def test_offloading_needs_a_gpu(pool: Ranks, tiny_model_dir: Path, tmp_path: Path) -> None:
    settings = ["training.strategy=fsdp", "cluster.num_workers=2", "fsdp.cpu_offload=true"]
    with pytest.raises(ConfigError, match="on the CPU already"):
        pool.run(2, train_rank, make_config(tiny_model_dir, tmp_path, *settings), ROWS)


@pytest.mark.parametrize("strategy", [FSDP, _zero("stage=3"), pytest.param(_zero("stage=2"), marks=SLOW)], ids="-".join)
def test_the_export_of_a_sharded_run_is_its_last_checkpoint(
    pool: Ranks, tiny_model_dir: Path, tmp_path: Path, strategy: list[str]
) -> None:
    """A tied matrix once."""
    settings = [*strategy, "cluster.num_workers=2", "export.enabled=true", "export.dtype=fp32"]
    pool.run(2, train_rank, make_config(tiny_model_dir, tmp_path, *settings), ROWS)
    exported, state = load_file(tmp_path / "export" / "model.safetensors"), _state(tmp_path)
    weights = {name.removeprefix("model/"): value for name, value in state.items() if name.startswith("model/")}
    assert weights.keys() == exported.keys()
    assert all(torch.equal(exported[name], value) for name, value in weights.items())
