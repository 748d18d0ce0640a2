"""What one training worker does: load, restore, run the loop, save, export. Ray stays outside: see ray_trainer.py."""

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from raylm.config import TrainConfig
from raylm.config.deepspeed import deepspeed_config
from raylm.data.stream import MicroBatch
from raylm.models.load import head_dim
from raylm.optim.build import averaging_beta, build_optimizer
from raylm.training.averages import Averages, Ema, ScheduleFree
from raylm.training.batch import Batch, empty_batch, to_batch
from raylm.training.checkpoint import check_identity, open_state, read_meta
from raylm.training.environment import write_host
from raylm.training.finish import export, rebuilt, tokenizer_and_end
from raylm.training.hardware import resolve_precision
from raylm.training.hooks import WorkerHooks
from raylm.training.job import WorkerData, WorkerJob
from raylm.training.lisa import Lisa
from raylm.training.loop import LoopSettings, run_loop
from raylm.training.metrics import EventsWriter
from raylm.training.module import LossModule, check_model
from raylm.training.prepare import load_base, prepared
from raylm.training.scaling import LossScaler
from raylm.training.stopping import DESCRIPTIONS, Stop
from raylm.training.strategies.base import Strategy
from raylm.training.strategies.table import strategy_class

logger = logging.getLogger(__name__)


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
    write_host(job.run.path)
    if events:
        events.write("loading the model")
    loss_scaling = config.strategy != "deepspeed"
    precision = resolve_precision(config.training.precision, device, loss_scaling=loss_scaling)
    scaler = LossScaler() if precision == "fp16" else None
    model = load_base(config, device, precision)
    tokenizer, end_token = tokenizer_and_end(config)
    module = LossModule(prepared(model, config), config.loss)
    isolated = config.data.packing or config.training.micro_batch_size > 1
    check_model(module, config.model.path, packing=isolated, precision=precision)
    if events:
        sizes = [parameter.numel() for parameter in module.parameters()]
        trained = sum(parameter.numel() for _, parameter in module.trainable())
        events.write("placing the model", parameters=sum(sizes), trainable_parameters=trained)
    strategy: Strategy = strategy_class(config.strategy)(
        module,
        lambda trainable: build_optimizer(trainable, config.optimizer, head_dim=head_dim(model.config)),
        device,
        _strategy_section(config, model, world_size),
    )
    parts = [part for part in (scaler,) if part]
    start_step = read_meta(job.start_from).step if job.start_from else 0
    switch = _switching(config, strategy, start_step) if config.training.method == "lisa" else None
    if job.start_from:
        if switch:
            switch(start_step)  # so that what rests is not brought to the device; the first step frees it
        _restore(job, strategy, parts)
    averages = _averages(config, strategy)
    hooks = WorkerHooks(job, data, strategy, precision, start_step, events, node_goes_away, parts, averages, switch)
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
            scaler=scaler,
        )
        hooks.end()
    finally:
        hooks.close()
    if rank == 0 and stop:
        job.run.stopped.write_text(DESCRIPTIONS[stop])
    if rank == 0 and config.export.enabled and stop != Stop.REQUESTED:
        assert events is not None
        events.write("exporting")
        whole = strategy.holds_whole_weights and not config.method.quantized
        with averages.in_place() if averages and whole else contextlib.nullcontext():
            export(job, module.model if whole else rebuilt(job), tokenizer, end_token)


def _averages(config: TrainConfig, strategy: Strategy) -> Averages | None:
    if config.training.ema_decay is not None:
        return Ema(strategy, config.training.ema_decay)
    beta = averaging_beta(config.optimizer)
    return None if beta is None else ScheduleFree(strategy, beta)


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


def _strategy_section(config: TrainConfig, model: Any, world_size: int) -> Any:
    if config.strategy == "deepspeed":
        hidden_size = model.config.get_text_config().hidden_size
        return deepspeed_config(config, hidden_size=hidden_size, world_size=world_size)
    return config.fsdp_or_default if config.strategy == "fsdp" else None


def _restore(job: WorkerJob, strategy: Strategy, parts: Sequence[Any]) -> None:
    assert job.start_from is not None
    meta = read_meta(job.start_from)
    check_identity(job.start_from, meta, job.identity)
    state = open_state(job.start_from, meta, rank=strategy.rank, world_size=strategy.world_size)
    strategy.load_state(state)
    for part in parts:
        part.load_state(state)
