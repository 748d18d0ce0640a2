"""What one training worker does: load, restore, run the loop, save, export. Ray stays outside: see ray_trainer.py."""

import contextlib
import itertools
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raylm.config import TrainConfig
from raylm.config.deepspeed import deepspeed_config
from raylm.data.stream import MicroBatch
from raylm.data.templates.table import AUTO, chat_template
from raylm.data.tokenizer import load_tokenizer
from raylm.errors import CheckpointError
from raylm.models.adapters import add_lora, add_new_rows, base_of, merged
from raylm.models.export import export_adapter, export_model, storage_dtype
from raylm.models.folder import as_folder
from raylm.models.load import load_model
from raylm.optim.build import build_optimizer
from raylm.training.batch import Batch, empty_batch, to_batch
from raylm.training.checkpoint import CheckpointMeta, check_identity, newest_checkpoint, open_state, read_meta
from raylm.training.checkpoint_writer import CheckpointWriter
from raylm.training.hardware import flops_per_token, matmul_peak_flops, matrices, memory_gib, resolve_precision
from raylm.training.lisa import Lisa
from raylm.training.loop import EvalResult, LoopSettings, StepResult, evaluate, run_loop
from raylm.training.metrics import EventsWriter, MetricsWriter, read_metrics
from raylm.training.mirror import mirror_of
from raylm.training.module import LossModule, check_model
from raylm.training.profiling import StepProfiler
from raylm.training.pulse import EXIT_CODE, Pulse
from raylm.training.run_dir import RunDir
from raylm.training.state import restore_weights
from raylm.training.stopping import DESCRIPTIONS, Patience, Stop, Watch
from raylm.training.strategies.base import Strategy
from raylm.training.strategies.table import strategy_class

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerJob:
    """All a worker needs to know, as plain values. steps_per_epoch: global batches of each epoch."""

    config: TrainConfig
    run: RunDir
    num_steps: int
    steps_per_epoch: tuple[int, ...]
    identity: dict[str, Any]
    start_from: Path | None
    deadline: float | None = None
    """When to stop, in seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class WorkerData:
    """A worker's share of the data. train: micro-batches from the start step on; evaluation: a fresh pass each call."""

    train: Callable[[], Iterable[MicroBatch]]
    evaluation: Callable[[], Iterable[MicroBatch]] | None


def run_worker(
    job: WorkerJob,
    data: WorkerData,
    device: torch.device,
    *,
    rank: int,
    world_size: int,
    node_goes_away: Callable[[], bool] = lambda: False,
) -> None:
    """Trains on this rank to the end and exports on rank 0.

    node_goes_away: asked by rank 0 before each step; True calls for a checkpoint.
    """
    config = job.config
    events = EventsWriter(job.run.path) if rank == 0 else None
    if events:
        events.write("loading the model")
    precision = resolve_precision(config.training.precision, device)
    model = load_model(config.model, device)
    tokenizer, end_token = _tokenizer_and_end(config)
    module = LossModule(prepared(model, config), config.loss)
    isolated = config.data.packing or config.training.micro_batch_size > 1
    check_model(module, config.model.path, packing=isolated)
    strategy: Strategy = strategy_class(config.strategy)(
        module,
        lambda trainable: build_optimizer(trainable, config.optimizer),
        device,
        _strategy_section(config, model, world_size),
    )
    start_step = _restore(job, strategy) if job.start_from else 0
    hooks = _WorkerHooks(job, data, strategy, precision, start_step, events, node_goes_away)
    try:
        stop = run_loop(
            strategy,
            steps_of(
                data.train(),
                micro_batches_per_step=config.micro_batches_per_step,
                start_step=start_step,
                rank=rank,
                world_size=world_size,
            ),
            LoopSettings(
                num_steps=job.num_steps,
                max_grad_norm=config.optimizer.max_grad_norm,
                seed=config.run.seed,
                precision=precision,
                schedule=config.schedule,
                eval_interval_steps=config.training.eval_interval_steps,
                save_interval_steps=config.checkpoint.interval_steps,
            ),
            hooks,
            start_step=start_step,
            before_step=_before_step(config, strategy, hooks, start_step),
        )
        hooks.end()
    finally:
        hooks.close()
    if rank == 0 and stop:
        job.run.stopped.write_text(DESCRIPTIONS[stop])
    if rank == 0 and config.export.enabled and stop != Stop.REQUESTED:
        assert events is not None
        events.write("exporting")
        _export(job, module.model if strategy.holds_whole_weights else _rebuilt(job), tokenizer, end_token)


def _before_step(
    config: TrainConfig, strategy: Strategy, hooks: "_WorkerHooks", start_step: int
) -> Callable[[int], None]:
    acts: list[Callable[[int], None]] = [hooks.before_step]
    if config.training.method == "lisa":
        acts.append(_switching(config, strategy, start_step))

    def before(step: int) -> None:
        for act in acts:
            act(step)

    return before


def _profiler(job: WorkerJob, strategy: Strategy) -> StepProfiler | None:
    steps = job.config.training.profile_steps
    if steps is None:
        return None
    return StepProfiler(job.run.profile / f"rank-{strategy.rank}.json", *steps, strategy.device)


def _switching(config: TrainConfig, strategy: Strategy, start_step: int) -> Callable[[int], None]:
    """What LISA does before a step; the first one of a run may lie within an interval."""
    section, module = config.lisa_or_default, strategy.module
    lisa = Lisa(section, module.model, module.trainable(), seed=config.run.seed)

    def switch(step: int) -> None:
        if step == start_step or lisa.begins_interval(step):
            interval = lisa.interval_of(step)
            strategy.train_only(lisa.names(interval), keep_state=section.keep_state)
            logger.info("step %d: LISA trains blocks %s", step + 1, ", ".join(map(str, lisa.layers(interval))))

    return switch


def steps_of(
    stream: Iterable[MicroBatch], *, micro_batches_per_step: int, start_step: int, rank: int = 0, world_size: int = 1
) -> Iterator[Sequence[Batch]]:
    """Groups a rank's stream into steps, and checks that each micro-batch is of the step it is used in.

    Micro-batches are dealt in turn from the start step on. Where they do not divide by the ranks, those with fewer in a
    step run one without labels: all ranks go through as many forwards and backwards.
    """
    iterator = iter(stream)
    passes = -(-micro_batches_per_step // world_size)
    for step in itertools.count(start_step):
        first = (step - start_step) * micro_batches_per_step
        own = len(range(first + (rank - first) % world_size, first + micro_batches_per_step, world_size))
        found = list(itertools.islice(iterator, own))
        if not found and own:
            return
        assert [batch.step for batch in found] == [step] * own, f"step {step}: {[batch.step for batch in found]}"
        yield [*(to_batch(batch) for batch in found), *(empty_batch() for _ in range(passes - own))]


class _WorkerHooks:
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
    ) -> None:
        self._job, self._data, self._strategy, self._precision = job, data, strategy, precision
        self._events = events
        self._writer: MetricsWriter | None = None
        if strategy.rank == 0:
            tensorboard = job.config.metrics.tensorboard
            self._writer = MetricsWriter(job.run.path, start_step=start_step, tensorboard=tensorboard)
        peak = matmul_peak_flops(precision, strategy.device)
        self._peak_flops = float(
            strategy.sum_over_ranks(torch.tensor(peak, dtype=torch.float64, device=strategy.device))
        )
        former = [line["eval/loss"] for line in read_metrics(job.run.path) if _is_former_evaluation(line, start_step)]
        self._patience = Patience(job.config.training.early_stopping_patience, former)
        self._watch = Watch(job.run.path, job.deadline, node_goes_away)
        section = job.config.checkpoint
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
        """Before the step, counted from 0."""
        if self._profiler is not None:
            self._profiler.before_step(step)

    def step_done(self, result: StepResult) -> None:
        """See Hooks."""
        self._checkpoints.check()
        if self._profiler is not None:
            self._profiler.step_done(result.step)
        if self._writer is None or not self._logged(result.step):
            return
        rate = result.tokens / result.seconds
        flops = flops_per_token(self._matrices)
        figures = {
            "train/loss": result.loss,
            "train/grad_norm": result.grad_norm,
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
        self._writer.write(result.step, figures)

    def evaluate(self, step: int) -> EvalResult | None:
        """See Hooks."""
        if self._data.evaluation is None:
            return None
        self._announce("evaluating", step=step, num_steps=self._job.num_steps)
        batches = (to_batch(part) for part in self._data.evaluation())
        result = evaluate(self._strategy, batches, precision=self._precision, alive=self.alive)
        figures = {"eval/loss": result.loss, "eval/perplexity": result.perplexity, "eval/loss_tokens": result.tokens}
        if self._writer is not None:
            self._writer.write(step, figures)
        self._goes_on(step)
        return result

    def wants_stop(self) -> Stop:
        """See Hooks."""
        return self._watch.reason()

    def evaluated(self, result: EvalResult) -> Stop:
        """See Hooks."""
        return Stop.NO_IMPROVEMENT if self._patience.is_over(result.loss) else Stop.NOT

    def save(self, step: int, evaluation: EvalResult | None) -> None:
        """See Hooks."""
        self._announce("saving", step=step, num_steps=self._job.num_steps)
        meta = CheckpointMeta(step, self._job.identity, evaluation.loss if evaluation else None)
        self._checkpoints.save(self._strategy.pieces(), meta, last=step == self._job.num_steps)
        self._goes_on(step)

    def _goes_on(self, step: int) -> None:
        if step < self._job.num_steps:
            self._announce("training", step=step, num_steps=self._job.num_steps, precision=self._precision)

    def end(self) -> None:
        """After the last step: until the last checkpoint is written. Raises CheckpointError."""
        self._checkpoints.close()

    def close(self) -> None:
        """Whatever happened: lets a checkpoint that is being written end, and closes the sinks."""
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


def prepared(model: Any, config: TrainConfig) -> Any:
    if config.training.method == "lora":
        model = add_lora(model, config.lora_or_default, seed=config.run.seed)
    elif config.training.method == "new_rows":
        model = add_new_rows(model)
    if config.training.gradient_checkpointing:
        base = base_of(model)
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _strategy_section(config: TrainConfig, model: Any, world_size: int) -> Any:
    if config.strategy == "deepspeed":
        hidden_size = model.config.get_text_config().hidden_size
        return deepspeed_config(config, hidden_size=hidden_size, world_size=world_size)
    return config.fsdp_or_default if config.strategy == "fsdp" else None


def _token(strategy: Strategy) -> str:
    """A number that rank 0 draws for this group of workers."""
    drawn = secrets.randbits(60) if strategy.rank == 0 else 0
    return f"{int(strategy.sum_over_ranks(torch.tensor(drawn, dtype=torch.int64, device=strategy.device))):015x}"


def _restore(job: WorkerJob, strategy: Strategy) -> int:
    assert job.start_from is not None
    meta = read_meta(job.start_from)
    check_identity(job.start_from, meta, job.identity)
    strategy.load_state(open_state(job.start_from, meta, rank=strategy.rank, world_size=strategy.world_size))
    return meta.step


def _tokenizer_and_end(config: TrainConfig) -> tuple[Any, str | None]:
    """The tokenizer with the chat template that was trained with, and the control token that ends an answer."""
    section = config.model
    tokenizer = load_tokenizer(
        as_folder(section.path, section.revision),
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
    )
    if config.data.template == AUTO and not tokenizer.chat_template:
        return tokenizer, tokenizer.eos_token  # a base model on plain text
    template = chat_template(config.data.template, tokenizer, section.path)
    if config.data.template != AUTO:
        tokenizer.chat_template = template.jinja()
    return tokenizer, template.end_token()


def _rebuilt(job: WorkerJob) -> Any:
    """The trained model on the CPU, from the base and the last checkpoint: no rank of a sharded run holds it."""
    newest = newest_checkpoint(job.run.checkpoints)
    assert newest is not None, "a run ends with a checkpoint"
    model = prepared(load_model(job.config.model, torch.device("cpu")), job.config)
    restore_weights(LossModule(model).trainable(), open_state(newest, read_meta(newest)))
    return model


def _export(job: WorkerJob, model: Any, tokenizer: Any, end_token: str | None) -> None:
    config = job.config
    dtype = storage_dtype(config.export.dtype, _stored_config(config))
    if config.training.method == "lora":
        export_adapter(model, tokenizer, job.run.adapter)
    if config.training.method in ("lora", "new_rows"):
        model = merged(model)
    export_model(model, tokenizer, job.run.export, dtype=dtype, end_token=end_token)


def _stored_config(config: TrainConfig) -> Any:
    from raylm.models.load import load_config

    return load_config(config.model)


def write_failure(run: RunDir, error: Exception) -> None:
    """Notes an error the user can mend, for the driver to raise; the first one stays."""
    if not run.failure.exists():
        run.failure.write_text(json.dumps({"kind": type(error).__name__, "arguments": list(error.args)}))
