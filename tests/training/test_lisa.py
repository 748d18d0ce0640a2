"""LISA: who learns when, what is kept in memory, and that it is full fine-tuning when all blocks learn."""

import gc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raylm.config.deepspeed import deepspeed_config
from raylm.config.sections import ModelSection
from raylm.config.training import FsdpSection, LisaSection, OptimizerSection
from raylm.errors import ConfigError
from raylm.models.load import load_config, load_model
from raylm.optim.build import build_optimizer
from raylm.training.batch import batch_of
from raylm.training.checkpoint import newest_checkpoint
from raylm.training.lisa import Lisa, check_lisa
from raylm.training.loop import train_step
from raylm.training.module import LossModule
from raylm.training.strategies.table import strategy_class
from tests.tiny import build_tiny_model
from tests.training.ranks import Ranks, ranks
from tests.training.support import Rows, make_config, read_checkpoint, run_in_process, whole_state

ROWS = Rows(60)
OUTSIDE = {"model.embed_tokens.weight", "model.norm.weight"}  # the head is tied


@pytest.fixture(scope="module")
def pool() -> Iterator[Ranks]:
    with ranks(2) as found:
        yield found


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five blocks."""
    return build_tiny_model(tmp_path_factory.mktemp("deep") / "deep", num_hidden_layers=5)


def _lisa(folder: Path, **settings: Any) -> Lisa:
    module = LossModule(load_model(ModelSection(path=str(folder)), torch.device("cpu")))
    return Lisa(LisaSection(**settings), module.model, module.trainable(), seed=3)


def test_blocks_are_drawn_alike_by_all_and_evenly(deep_model: Path) -> None:
    one, other = _lisa(deep_model), _lisa(deep_model)
    drawn = [one.layers(interval) for interval in range(2000)]
    assert drawn == [other.layers(interval) for interval in range(2000)]
    assert all(len(set(layers)) == 2 for layers in drawn)
    counts = Counter(layer for layers in drawn for layer in layers)
    assert set(counts) == set(range(5))
    assert all(abs(count - 800) < 5 * (800 * 0.6) ** 0.5 for count in counts.values())  # five standard deviations


def test_weights_say_how_likely_a_block_is(deep_model: Path) -> None:
    lisa = _lisa(deep_model, num_active_layers=1, layer_weights=(1, 0, 3, 0, 0))
    counts = Counter(lisa.layers(interval)[0] for interval in range(2000))
    assert set(counts) == {0, 2}
    assert counts[2] / counts[0] == pytest.approx(3, rel=0.2)


def test_what_is_always_active_can_be_chosen(deep_model: Path) -> None:
    def outside(*kinds: Any) -> set[str]:
        names = _lisa(deep_model, always_active=kinds).names(0)
        return {name for name in names if ".layers." not in name}

    assert outside("embeddings", "head", "final_norm") == OUTSIDE
    assert outside("head") == outside("embeddings") == {"model.embed_tokens.weight"}  # one matrix
    assert outside("final_norm") == {"model.norm.weight"}
    assert outside() == set()


def test_settings_that_do_not_fit_the_model_are_refused(deep_model: Path) -> None:
    config = load_config(ModelSection(path=str(deep_model)))
    with pytest.raises(ConfigError, match="6 is more than the model's 5 layers"):
        check_lisa(LisaSection(num_active_layers=6), config)
    with pytest.raises(ConfigError, match="has 2 values, the model has 5 layers"):
        check_lisa(LisaSection(num_active_layers=1, layer_weights=(1, 1)), config)


def _section(folder: str, strategy: str, world_size: int) -> Any:
    if strategy == "deepspeed":
        settings = [
            f"training.strategy={strategy}",
            f"cluster.num_workers={world_size}",
            "training.global_batch_size=4",
        ]
        return deepspeed_config(make_config(Path(folder), Path("unused"), *settings), hidden_size=32)
    return FsdpSection() if strategy == "fsdp" else None


def _walk(
    rank: int, world_size: int, folder: str, strategy_name: str, keep_state: bool, options: dict[str, Any]
) -> list[tuple[set[str], set[str], dict[str, int]]]:
    """Eight intervals of two steps. Of each: the blocks drawn as parameter names, the parameters that changed, and the
    elements of optimizer state by parameter."""
    device = torch.device("cpu")
    model = load_model(ModelSection(path=folder), device)
    if options.get("gradient_checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    module = LossModule(model)
    section = _section(folder, strategy_name, world_size)
    optimizer = OptimizerSection(learning_rate=1e-2, weight_decay=0.1)
    strategy = strategy_class(strategy_name)(module, lambda named: build_optimizer(named, optimizer), device, section)
    lisa = Lisa(LisaSection(interval_steps=2), module.model, module.trainable(), seed=3)
    found = []
    before = whole_state(strategy)
    for interval in range(8):
        strategy.train_only(lisa.names(interval), keep_state=keep_state)
        for step in range(2):
            batches = []
            for number in range(2):  # accumulation
                rng = np.random.default_rng([interval, step, number, rank])
                ids = rng.integers(0, 200, int(rng.integers(5, 20))).astype(np.int32)
                batches.append(batch_of([ids], [np.ones(len(ids), bool)]))
            train_step(strategy, batches, max_grad_norm=1.0, precision="fp32", step=step)
        after = whole_state(strategy)
        weights = [name for name in after if name.startswith("model/")]
        changed = {name[6:] for name in weights if not torch.equal(after[name], before[name])}
        sizes: dict[str, int] = {}
        for name, value in after.items():
            if name.startswith("optimizer/") and value.ndim:
                owner = name.removeprefix("optimizer/").rpartition("/")[0]
                sizes[owner] = sizes.get(owner, 0) + value.numel()
        found.append((set(lisa.names(interval)), changed, sizes))
        before = after
    return found


@pytest.mark.parametrize(
    ("keep_state", "options"),
    [
        (False, {"gradient_checkpointing": True}),
        (True, {}),
        pytest.param(False, {}, marks=pytest.mark.slow),
        pytest.param(True, {"gradient_checkpointing": True}, marks=pytest.mark.slow),
    ],
    ids=["freed-checkpointing", "kept-plain", "freed-plain", "kept-checkpointing"],
)
@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp", "deepspeed"])
def test_only_the_drawn_blocks_learn_and_hold_state(
    pool: Ranks, deep_model: Path, strategy: str, keep_state: bool, options: dict[str, Any]
) -> None:
    """Frozen parameters keep every bit, under weight decay too; state is that of the active ones, or parked."""
    if strategy == "single":
        found = _walk(0, 1, str(deep_model), strategy, keep_state, options)
    else:
        found = pool.run(2, _walk, str(deep_model), strategy, keep_state, options)[0]
    module = LossModule(load_model(ModelSection(path=str(deep_model)), torch.device("cpu")))
    elements = {name: parameter.numel() for name, parameter in module.trainable()}
    seen: set[str] = set()
    for names, changed, sizes in found:
        seen |= names
        assert changed == names
        assert OUTSIDE < names < set(elements)
        assert set(sizes) == (seen if keep_state else names)
        assert all(size == 2 * elements[name] for name, size in sizes.items())
    assert seen == set(elements), "every block's turn has come"
    totals = {sum(sizes.values()) for _, _, sizes in found}
    assert len(totals) == 1 or keep_state, "memory is the same in every interval"


def test_engines_of_former_intervals_are_gone(pool: Ranks, deep_model: Path) -> None:
    """Nothing of them stays: no hook, no flat tensor of what trained then."""
    for engines, hooks, elements, whole in pool.run(2, _left_behind, str(deep_model)):
        assert engines == [1] * 6
        assert len(set(hooks)) == 1
        assert all(count <= 0.6 * whole for count in elements), "a half, and the padding"


def _left_behind(rank: int, world_size: int, folder: str) -> tuple[list[int], list[int], list[int], int]:
    """Of six intervals: engines alive, hooks on modules and parameters, elements of storage under the parts of weights;
    and the elements of the model."""
    from deepspeed import DeepSpeedEngine

    module = LossModule(load_model(ModelSection(path=folder), torch.device("cpu")))
    whole = sum(parameter.numel() for parameter in module.parameters())
    strategy = strategy_class("deepspeed")(
        module,
        lambda named: build_optimizer(named, OptimizerSection()),
        torch.device("cpu"),
        _section(folder, "deepspeed", world_size),
    )
    lisa = Lisa(LisaSection(num_active_layers=1), module.model, module.trainable(), seed=3)
    others = _alive(DeepSpeedEngine)  # a strategy that another test has dropped keeps its last one
    engines, hooks, elements = [], [], []
    batch = batch_of([np.arange(9, dtype=np.int32)], [np.ones(9, bool)])
    for interval in range(6):
        strategy.train_only(lisa.names(interval), keep_state=False)
        train_step(strategy, [batch, batch], max_grad_norm=1.0, precision="fp32", step=interval)
        engines.append(_alive(DeepSpeedEngine) - others)
        hooks.append(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()))
        storages = {p.ds_tensor.untyped_storage().data_ptr(): p.ds_tensor for p in module.parameters()}
        elements.append(sum(part.untyped_storage().nbytes() // 4 for part in storages.values()))
    return engines, hooks, elements, whole


def _alive(kind: type) -> int:
    gc.collect()
    return sum(type(found) is kind for found in gc.get_objects())


def _curve(lines: list[dict[str, Any]]) -> list[tuple[float, float]]:
    return [(line["train/loss"], line["train/grad_norm"]) for line in lines]


def _state(run_dir: Path) -> dict[str, torch.Tensor]:
    newest = newest_checkpoint(run_dir / "checkpoints")
    assert newest is not None
    return read_checkpoint(newest)


def test_all_blocks_at_once_are_full_fine_tuning_bit_for_bit(deep_model: Path, tmp_path: Path) -> None:
    full = run_in_process(make_config(deep_model, tmp_path / "full"), ROWS)
    options = ["training.method=lisa", "lisa.num_active_layers=5", "lisa.interval_steps=2"]
    lisa = run_in_process(make_config(deep_model, tmp_path / "lisa", *options), ROWS)
    assert _curve(lisa) == _curve(full)
    expected, got = _state(tmp_path / "full"), _state(tmp_path / "lisa")
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.parametrize("keep_state", ["false", "true"])
@pytest.mark.parametrize("killed_at", [4, 6])
def test_resuming_within_an_interval_equals_the_uninterrupted_run(
    deep_model: Path, tmp_path: Path, keep_state: str, killed_at: int
) -> None:
    options = ["training.method=lisa", "lisa.interval_steps=3", f"lisa.keep_state={keep_state}"]
    options += ["checkpoint.interval_steps=1", "checkpoint.keep_last=99"]
    whole = run_in_process(make_config(deep_model, tmp_path / "whole", *options), ROWS)
    config = make_config(deep_model, tmp_path / "cut", *options)
    run_in_process(config, ROWS, stop_after=killed_at)
    newest = newest_checkpoint(tmp_path / "cut" / "checkpoints")
    assert newest is not None
    assert newest.name == f"step-{killed_at:08d}"
    resumed = run_in_process(config, ROWS, start_from=newest, start=killed_at)
    assert _curve(resumed) == _curve(whole)
    expected, got = _state(tmp_path / "whole"), _state(tmp_path / "cut")
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
