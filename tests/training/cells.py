"""Optimizers under strategies: the losses of short runs of the loop, without Ray and without files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from raylm.config import TrainConfig
from raylm.optim.table import OPTIMIZERS
from tests.training.support import Rows, make_config

STEPS = 20
PER_STEP = 4
ROWS = Rows(2 * PER_STEP)
"""Two global batches, in turn."""
STRATEGIES: dict[str, tuple[str, ...]] = {
    "single": (),
    "ddp 2": ("training.strategy=ddp", "cluster.num_workers=2"),
    "fsdp 2": ("training.strategy=fsdp", "cluster.num_workers=2"),
    "zero-2": ("training.strategy=deepspeed", "deepspeed.stage=2", "cluster.num_workers=2"),
    "zero-3": ("training.strategy=deepspeed", "deepspeed.stage=3", "cluster.num_workers=2"),
}
LISA = ("training.method=lisa", "lisa.num_active_layers=1", "lisa.interval_steps=4")
CELLS = {**STRATEGIES, "lisa": (*STRATEGIES["fsdp 2"], *LISA)}
"""The columns of the matrix. LISA on two ranks of FSDP is held against LISA in one process."""


RATE_SHARES = {"soap": 0.03}
"""SOAP has no basis of its own in directions that no gradient had so far: rounding chooses one, and gradients that were
summed in another order choose another, with ddp as with the rest."""


SMALL: dict[str, Any] = {
    **{name: {"rank": 4, "interval_steps": 6} for name in ("galore", "apollo")},
    **{name: {"min_8bit_size": 256} for name, row in OPTIMIZERS.items() if row.state_bits == 8},
    **{name: {"hessian_interval_steps": 4} for name, row in OPTIMIZERS.items() if row.estimates},
    "soap": {"precondition_frequency": 5},
}
"""Options with which so small a model, in so few steps, reaches what makes a row special."""


def settings_of(name: str) -> list[str]:
    """An optimizer at the highest rate of its row, but for RATE_SHARES."""
    row = OPTIMIZERS[name]
    rate = row.learning_rates[1] * RATE_SHARES.get(name, 1.0)
    found = [f"optimizer.name={name}", f"optimizer.learning_rate={rate}"]
    found += ["optimizer.weight_decay=0.1", f"training.global_batch_size={PER_STEP}"]
    found += ["schedule.name=constant", "schedule.warmup_steps=2"] if row.averages else []
    return found + ([f"optimizer.options={json.dumps(SMALL[name])}"] if name in SMALL else [])


def config_of(model_dir: Path | str, name: str, settings: Sequence[str]) -> TrainConfig:
    """The configuration of a cell."""
    return make_config(Path(model_dir), Path("unused"), *settings_of(name), *settings)


def losses(
    rank: int, world_size: int, model_dir: str, settings: Sequence[str], names: Sequence[str], steps: int = STEPS
) -> dict[str, list[float]]:
    """Loss of every step for each optimizer. Each rank has its half of the rows."""
    return {name: _losses(rank, world_size, config_of(model_dir, name, settings), steps) for name in names}


class _Recorder:
    """Hooks that note losses, and switch what LISA trains."""

    def __init__(self, switch: Any) -> None:
        self.losses: list[float] = []
        self._switch = switch

    def before_step(self, step: int) -> None:
        if self._switch:
            self._switch(step)

    def step_done(self, result: Any) -> None:
        self.losses.append(result.loss)

    def alive(self, doing: str) -> None: ...

    def evaluate(self, step: int) -> None: ...

    def save(self, step: int, evaluation: Any) -> None: ...

    def wants_stop(self) -> Any:
        from raylm.training.stopping import Stop

        return Stop.NOT


def strategy_of(config: TrainConfig, world_size: int) -> Any:
    """The strategy of a configuration over its model."""
    from raylm.models.load import load_model
    from raylm.optim.build import build_optimizer
    from raylm.training.module import LossModule
    from raylm.training.strategies.table import strategy_class
    from raylm.training.worker import _strategy_section, head_dim

    device = torch.device("cpu")
    module = LossModule(load_model(config.model, device))
    section = _strategy_section(config, module.model, world_size)
    return strategy_class(config.strategy)(
        module,
        lambda named: build_optimizer(named, config.optimizer, head_dim=head_dim(module.model.config)),
        device,
        section,
    )


def _losses(rank: int, world_size: int, config: TrainConfig, steps: int) -> list[float]:
    from raylm.training.batch import batch_of
    from raylm.training.loop import LoopSettings, run_loop
    from raylm.training.worker import _switching

    strategy = strategy_of(config, world_size)
    switch = _switching(config, strategy, 0) if config.training.method == "lisa" else None
    batches = [
        [
            batch_of([ROWS.ids[number % len(ROWS.ids)]], [ROWS.masks[number % len(ROWS.ids)]])
            for number in range(step * PER_STEP + rank, (step + 1) * PER_STEP, world_size)
        ]
        for step in range(steps)
    ]
    hooks: Any = _Recorder(switch)
    settings = LoopSettings(steps, max_grad_norm=1.0, seed=0, precision="fp32", schedule=config.schedule)
    run_loop(strategy, batches, settings, hooks)
    return hooks.losses
