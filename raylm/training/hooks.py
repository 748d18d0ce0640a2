"""What one worker does around the steps of the loop: figures, evaluation, checkpoints, signs of life."""

import contextlib
import logging
import math
import os
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import torch

from raylm.errors import CheckpointError
from raylm.training.averages import Averages
from raylm.training.batch import to_batch
from raylm.training.checkpoint import CheckpointMeta
from raylm.training.checkpoint_writer import CheckpointWriter
from raylm.training.hardware import flops_per_token, matmul_peak_flops, matrices, memory_gib
from raylm.training.job import WorkerData, WorkerJob
from raylm.training.loop import EvalResult, StepResult, evaluate
from raylm.training.metrics import EventsWriter, MetricsWriter, read_metrics
from raylm.training.mirror import mirror_of
from raylm.training.profiling import StepProfiler
from raylm.training.pulse import EXIT_CODE, Pulse
from raylm.training.state import Piece
from raylm.training.stopping import Patience, Stop, Watch
from raylm.training.strategies.base import Strategy

logger = logging.getLogger(__name__)


class WorkerHooks:
    """Figures, evaluation and checkpoints of one worker."""

    def __init__(
        self,
        job: WorkerJob,
        data: WorkerData,
        strategy: Strategy,
        precision: str,
        start_step: int,
        events: EventsWriter | None,
        node_goes_away: Callable[[], bool],
        parts: Sequence[Any],
        averages: Averages | None,
        switch: Callable[[int], None] | None,
    ) -> None:
        """parts: what a checkpoint holds besides weights and optimizer state. switch: chooses what trains in a step."""
        self._parts, self._averages, self._switch = parts, averages, switch
        self._job, self._data, self._strategy, self._precision = job, data, strategy, precision
        self._events = events
        self._writer: MetricsWriter | None = None
        if strategy.rank == 0:
            self._writer = MetricsWriter(job.run.path, start_step=start_step)
        peak = matmul_peak_flops(precision, strategy.device)
        self._peak_flops = float(
            strategy.sum_over_ranks(torch.tensor(peak, dtype=torch.float64, device=strategy.device))
        )
        former = [line["eval/loss"] for line in read_metrics(job.run.path) if _is_former_evaluation(line, start_step)]
        self._patience = Patience(job.config.training.early_stopping_patience, former)
        self._watch = Watch(job.run.path, job.deadline, node_goes_away)
        section = job.config.checkpoint
        self._step = start_step
        self._checkpoints = CheckpointWriter(
            job.run.checkpoints,
            rank=strategy.rank,
            world_size=strategy.world_size,
            token=_token(strategy),
            asynchronous=section.asynchronous,
            keep_last=section.keep_last,
            keep_best=section.keep_best,
            keeper=mirror_of(section.mirror),
        )
        self._matrices = matrices(strategy.module)
        self._profiler = _profiler(job, strategy)
        self._pulse = Pulse(
            job.run.ranks,
            rank=strategy.rank,
            world_size=strategy.world_size,
            timeout_s=job.config.cluster.stuck_timeout_s,
            give_up=self._give_up,
        )
        self._announce(
            "training", step=start_step, num_steps=job.num_steps, precision=precision, workers=strategy.world_size
        )

    def alive(self, doing: str) -> None:
        """See Hooks."""
        self._pulse.beat(doing)

    def _give_up(self, found: str) -> None:
        """In the pulse's thread: the main one waits for ever."""
        logger.error("%s", found)
        with contextlib.suppress(OSError):
            self._job.run.stuck.write_text(found)
        os._exit(EXIT_CODE)

    def before_step(self, step: int) -> None:
        """See Hooks."""
        if self._profiler is not None:
            self._profiler.before_step(step)
        self._step = step
        if self._switch is not None:
            self._switch(step)

    def step_done(self, result: StepResult) -> None:
        """See Hooks."""
        self._checkpoints.check()
        if self._profiler is not None:
            self._profiler.step_done(result.step)
        if self._averages and math.isfinite(result.grad_norm):  # else the step was passed over
            self._averages.update()
        if self._writer is None or not self._logged(result.step):
            return
        rate = result.tokens / result.seconds
        flops = flops_per_token(self._matrices)
        figures = {
            "train/loss": result.loss,
            **({"train/grad_norm": result.grad_norm} if math.isfinite(result.grad_norm) else {}),
            "train/learning_rate": result.learning_rate,
            "train/epoch": epoch_at(self._job.steps_per_epoch, result.step),
            "train/tokens": result.tokens,
            "train/loss_tokens": result.loss_tokens,
            "train/tokens_per_second": rate,
            "train/flops": result.tokens * flops,
            "train/mfu": rate * flops / self._peak_flops,
            "train/step_s": result.seconds,
            "train/data_wait_s": result.data_seconds,
            **{f"memory/{name}": value for name, value in memory_gib(self._strategy.device).items()},
        }
        for part in self._parts:
            figures |= part.figures()
        self._writer.write(result.step, figures)

    def evaluate(self, step: int) -> EvalResult | None:
        """See Hooks."""
        if self._data.evaluation is None:
            return None
        self._announce("evaluating", step=step, num_steps=self._job.num_steps)
        batches = (to_batch(part) for part in self._data.evaluation())
        with self._averages.in_place() if self._averages else contextlib.nullcontext():
            result = evaluate(self._strategy, batches, precision=self._precision, alive=self.alive)
        figures = {"eval/loss": result.loss, "eval/perplexity": result.perplexity, "eval/loss_tokens": result.tokens}
        if self._writer is not None:
            self._writer.write(step, figures)
        self._goes_on(step)
        return result

    def wants_stop(self) -> Stop:
        """See Hooks."""
        return self._watch.reason(self._step, self.alive)

    def evaluated(self, result: EvalResult) -> Stop:
        """See Hooks."""
        return Stop.NO_IMPROVEMENT if self._patience.is_over(result.loss) else Stop.NOT

    def save(self, step: int, evaluation: EvalResult | None) -> None:
        """See Hooks."""
        self._announce("saving", step=step, num_steps=self._job.num_steps)
        meta = CheckpointMeta(step, self._job.identity, evaluation.loss if evaluation else None)
        pieces = self._strategy.pieces()
        if self._strategy.rank == 0:
            found = {name: tensor for part in self._parts for name, tensor in part.state().items()}
            pieces |= {name: Piece(tensor, 0, tuple(tensor.shape)) for name, tensor in found.items()}
        self._checkpoints.save(pieces, meta, last=step == self._job.num_steps)
        self._goes_on(step)

    def _goes_on(self, step: int) -> None:
        if step < self._job.num_steps:
            self._announce("training", step=step, num_steps=self._job.num_steps, precision=self._precision)

    def end(self) -> None:
        """After the last step: until the last checkpoint is written. Raises CheckpointError."""
        self._checkpoints.close()

    def close(self) -> None:
        """Whatever happened: lets a checkpoint that is being written end, and closes the file of figures."""
        with contextlib.suppress(CheckpointError):
            self._checkpoints.wait()
        if self._profiler is not None:
            self._profiler.close()
        self._pulse.close()
        if self._writer is not None:
            self._writer.close()

    def _logged(self, step: int) -> bool:
        return step % self._job.config.metrics.log_interval_steps == 0 or step == self._job.num_steps

    def _announce(self, phase: str, **details: Any) -> None:
        if self._events is not None:
            self._events.write(phase, **details)


def _is_former_evaluation(line: dict[str, Any], start_step: int) -> bool:
    return "eval/loss" in line and line["step"] <= start_step


def epoch_at(steps_per_epoch: tuple[int, ...], step: int) -> float:
    """Epochs done after `step` steps, as a fraction."""
    for epoch, steps in enumerate(steps_per_epoch):
        if step < steps:
            return epoch + step / steps
        step -= steps
    return float(len(steps_per_epoch))


def _token(strategy: Strategy) -> str:
    """A number that rank 0 draws for this group of workers."""
    drawn = secrets.randbits(60) if strategy.rank == 0 else 0
    return f"{int(strategy.sum_over_ranks(torch.tensor(drawn, dtype=torch.int64, device=strategy.device))):015x}"


def _profiler(job: WorkerJob, strategy: Strategy) -> StepProfiler | None:
    steps = job.config.training.profile_steps
    if steps is None:
        return None
    return StepProfiler(job.run.profile / f"rank-{strategy.rank}.json", *steps, strategy.device)
