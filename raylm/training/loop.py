"""The training loop: plain PyTorch, no Ray. It receives batches, a strategy and hooks, and knows no files.

Called by Ray Train workers, by unit tests and by a profiler alike.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from raylm.config.training import ScheduleSection
from raylm.errors import TrainingError
from raylm.optim.schedules import learning_rate_factor
from raylm.training.batch import Batch, empty_batch
from raylm.training.curvature import estimate_hessian
from raylm.training.hardware import autocast
from raylm.training.scaling import LossScaler
from raylm.training.stopping import Stop
from raylm.training.strategies.base import Strategy


@dataclass(frozen=True, slots=True)
class StepResult:
    """Figures of one optimizer step over all ranks. loss: nats per label; tokens: all, loss_tokens: labels;
    grad_norm: before clipping, infinite for an fp16 step that was passed over; seconds: wall time of the step, waiting
    for data included."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    loss_tokens: int
    seconds: float
    data_seconds: float


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Loss over an evaluation set, each label weighing the same. loss: nats per label."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """When the loop does what. Steps count from 1 once done; None means only at the end."""

    num_steps: int
    max_grad_norm: float
    seed: int
    precision: str
    schedule: ScheduleSection
    eval_interval_steps: int | None = None
    save_interval_steps: int | None = None


class Hooks(Protocol):
    """What the loop calls on every rank. `save` follows an evaluation of the same step and receives its result."""

    def alive(self, doing: str) -> None:
        """Before whatever may take long, with what it is, as in `rank 3 …`."""
        ...

    def before_step(self, step: int) -> None:
        """Before each step is taken, with its number from 0."""
        ...

    def step_done(self, result: StepResult) -> None:
        """After each optimizer step."""
        ...

    def evaluate(self, step: int) -> EvalResult | None:
        """At evaluation steps; None when there is nothing to evaluate on."""
        ...

    def wants_stop(self) -> Stop:
        """Before each step, on rank 0: whether the run should end, or only save, after it."""
        ...

    def evaluated(self, result: EvalResult) -> Stop:
        """After each evaluation, alike on all ranks: whether the run should end here."""
        ...

    def save(self, step: int, evaluation: EvalResult | None) -> None:
        """At checkpoint steps."""
        ...


def run_loop(
    strategy: Strategy,
    steps: Iterable[Sequence[Batch]],
    settings: LoopSettings,
    hooks: Hooks,
    *,
    start_step: int = 0,
    scaler: LossScaler | None = None,
) -> Stop:
    """Trains from `start_step` to the end, or until the hooks want a stop; returns why.

    steps: this rank's micro-batches of each global batch, in order.

    scaler: of fp16 runs. Raises TrainingError before the update when loss or gradient is not finite.
    """
    base_rates = [group["lr"] for group in strategy.optimizer.param_groups]
    iterator: Iterator[Sequence[Batch]] = iter(steps)
    strategy.module.train()
    for step in range(start_step, settings.num_steps):
        started = time.perf_counter()
        hooks.alive(f"waits for the data of step {step + 1}")
        micro_batches = next(iterator)
        data_seconds = time.perf_counter() - started
        hooks.before_step(step)
        stop = _agreed(strategy, hooks)
        factor = learning_rate_factor(settings.schedule, step, settings.num_steps)
        for group, rate in zip(strategy.optimizer.param_groups, base_rates, strict=True):
            group["lr"] = rate * factor
        seed = settings.seed * 1_000_003 + step * 4_099
        interval = getattr(strategy.optimizer, "hessian_interval_steps", 0)
        if interval and step % interval == 0:
            torch.manual_seed(seed + strategy.rank)
            estimate_hessian(
                strategy,
                micro_batches,
                precision=settings.precision,
                seed=seed % 2**63,
                alive=hooks.alive,
                scaler=scaler,
            )
        # Dropout is a function of (seed, step, rank): there is no generator state to save or to lose.
        torch.manual_seed(seed + strategy.rank)
        loss, grad_norm, tokens, loss_tokens = train_step(
            strategy,
            micro_batches,
            max_grad_norm=settings.max_grad_norm,
            precision=settings.precision,
            step=step + 1,
            alive=hooks.alive,
            scaler=scaler,
        )
        seconds = time.perf_counter() - started
        rate = base_rates[0] * factor
        hooks.step_done(StepResult(step + 1, loss, grad_norm, rate, tokens, loss_tokens, seconds, data_seconds))
        stop = _after_step(step + 1, settings, hooks, stop)
        if stop:
            return stop
    return Stop.NOT


def _agreed(strategy: Strategy, hooks: Hooks) -> Stop:
    """What rank 0 wants."""
    wanted = hooks.wants_stop() if strategy.rank == 0 else Stop.NOT
    return Stop(int(strategy.sum_over_ranks(torch.tensor(int(wanted), dtype=torch.int64, device=strategy.device))))


def train_step(
    strategy: Strategy,
    micro_batches: Sequence[Batch],
    *,
    max_grad_norm: float,
    precision: str,
    step: int,
    alive: Callable[[str], None] = lambda doing: None,
    scaler: LossScaler | None = None,
) -> tuple[float, float, int, int]:
    """One optimizer step over one global batch; returns loss per label, gradient norm, tokens and labels, of all ranks.

    Every loss-carrying token weighs the same, however packing, accumulation and ranks split the batch. Raises
    TrainingError before the update when loss or gradient is not finite; a scaler passes over such a gradient.
    """
    counts = torch.tensor(
        [sum(batch.num_tokens for batch in micro_batches), sum(batch.loss_tokens for batch in micro_batches)],
        dtype=torch.int64,
        device=strategy.device,
    )
    tokens, loss_tokens = (int(value) for value in strategy.sum_over_ranks(counts))
    loss_sum = torch.zeros((), device=strategy.device)
    for index, batch in enumerate(micro_batches):
        alive(f"computes micro-batch {index + 1} of {len(micro_batches)} of step {step}")
        with strategy.accumulate(last=index == len(micro_batches) - 1):  # around forward too: DDP decides there
            with autocast(precision, strategy.device):
                loss = strategy.loss(batch.to(strategy.device))  # a sum, not a mean
            strategy.backward(loss / loss_tokens * (scaler.scale if scaler else 1.0))
        loss_sum += loss.detach()
    mean_loss = float(strategy.sum_over_ranks(loss_sum)) / loss_tokens
    alive(f"takes step {step}")
    if scaler:
        scaler.unscale(strategy.optimizer)
    grad_norm = float(strategy.clip_grad_norm(max_grad_norm))
    if scaler and math.isfinite(mean_loss) and not scaler.accepts(grad_norm, strategy.optimizer, step=step):
        return mean_loss, math.inf, tokens, loss_tokens
    if not (math.isfinite(mean_loss) and math.isfinite(grad_norm)):
        raise TrainingError(
            f"step {step}",
            f"the loss is {mean_loss} and the gradient norm {grad_norm}; the weights were not updated.",
            "Lower optimizer.learning_rate, or look for damaged rows in the data.",
        )
    strategy.optimizer_step()
    return mean_loss, grad_norm, tokens, loss_tokens


@torch.no_grad()
def evaluate(
    strategy: Strategy,
    batches: Iterable[Batch],
    *,
    precision: str,
    alive: Callable[[str], None] = lambda doing: None,
) -> EvalResult:
    """The loss over this and all other ranks' batches; ranks may have different numbers of them."""
    strategy.module.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=strategy.device)
    alone = strategy.holds_whole_weights  # then not through what wraps the module: DDP has collectives of its own
    forward = strategy.module if alone else strategy.loss
    for batch in batches if alone else _in_step(strategy, batches):
        alive("evaluates")
        with autocast(precision, strategy.device):
            sums[0] += forward(batch.to(strategy.device)).double()
        sums[1] += batch.loss_tokens
    strategy.module.train()
    loss, tokens = strategy.sum_over_ranks(sums).tolist()
    return EvalResult(loss / tokens, int(tokens))


def _in_step(strategy: Strategy, batches: Iterable[Batch]) -> Iterator[Batch]:
    """As many batches on each rank as on the one with the most; those that are short run one without labels."""
    iterator = iter(batches)
    while True:
        batch = next(iterator, None)
        if not int(strategy.sum_over_ranks(torch.tensor(batch is not None, dtype=torch.int64, device=strategy.device))):
            return
        yield batch or empty_batch()


def _after_step(step: int, settings: LoopSettings, hooks: Hooks, stop: Stop) -> Stop:
    last = step == settings.num_steps
    evaluation = None
    if stop == Stop.SAVE:  # before an evaluation, for which there may be no time
        hooks.alive(f"saves step {step}")
        hooks.save(step, None)
        stop = Stop.NOT
    if (last or _due(step, settings.eval_interval_steps)) and stop != Stop.REQUESTED:
        evaluation = hooks.evaluate(step)
        if evaluation is not None:
            stop = stop or hooks.evaluated(evaluation)
    if last or stop or _due(step, settings.save_interval_steps):
        hooks.alive(f"saves step {step}")
        hooks.save(step, evaluation)
    return Stop.NOT if last else stop


def _due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0
