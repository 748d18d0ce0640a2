"""A run before it starts: `raylm plan`. No Ray, no weights; every check that a run makes before Ray starts."""

from dataclasses import dataclass, replace

import torch

from raylm.config import TrainConfig
from raylm.data.survey import Survey, survey
from raylm.errors import ConfigError
from raylm.models.kernels import check_kernels
from raylm.optim.schedules import learning_rate_factor
from raylm.training.before_start import check_before_start, with_absolute_paths
from raylm.training.datasets import order_of
from raylm.training.hardware import flops_per_token, matmul_peak_flops, matrices, resolve_precision
from raylm.training.lisa import Lisa
from raylm.training.module import LossModule
from raylm.training.planning.memory import Memory, layout_of, memory_table
from raylm.training.run_dir import check_run_dir

PROGRAM_BYTES = 600 * 2**20
"""Of a worker process on the host before a model loads: Python, PyTorch, transformers and Ray."""
SAMPLE_SEQUENCES = 65_536
"""Estimated runs of more are planned over so many, and scaled."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will be. rates: learning rate by step; flops: by the usual rule (training/hardware.py); seconds: at
    `tokens_per_second`, None where no step is known; memory: of one rank, by strategy; limit_bytes: what each rank can
    have on its device; data_source: where the numbers of rows come from (data/survey.py)."""

    model: str
    method: str
    strategy: str
    workers: int
    device: str
    precision: str
    parameters: int
    trainable_parameters: int
    data_source: str
    sequences: int
    steps_per_epoch: tuple[int, ...]
    steps: int
    tokens: int
    tokens_per_step: int
    loss_share: float
    rates: tuple[tuple[int, float], ...]
    flops_per_token: int
    flops: float
    tokens_per_second: float
    rate_source: str
    seconds: float
    limit_bytes: int
    limit_source: str
    program_bytes: int
    memory: tuple[Memory, ...]

    @property
    def chosen(self) -> Memory:
        """Memory of the strategy that the configuration names."""
        return next(row for row in self.memory if row.chosen)

    @property
    def fits(self) -> bool:
        """Whether the chosen strategy fits."""
        return bool(self.chosen.fits)


def plan_training(
    config: TrainConfig,
    *,
    tokens_per_second: float | None = None,
    utilisation: float = 0.4,
    memory_gib: float | None = None,
) -> Plan:
    """The plan of a run on this machine's kind of processor.

    tokens_per_second: of all ranks, as measured; else the time is that of `utilisation` (MFU) of the peak of a matrix
    product, measured here, on each GPU, or on all cores together. memory_gib: of each rank; default: the GPU's, or an
    equal share of this machine's for each worker. Raises RaylmError for whatever would stop the run before it starts.
    """
    _check_options(tokens_per_second, utilisation, memory_gib)
    config = with_absolute_paths(config)
    check_run_dir(config)
    source = check_before_start(config)
    device = _device(config)
    precision = resolve_precision(config.training.precision, device)
    check_kernels(config.model.kernels, on_gpu=device.type == "cuda")
    found = survey(config.data.train, config.data, source, seed=config.run.seed)
    module, trainable = _meta_module(config)
    steps_per_epoch, steps, tokens = _steps(config, found)
    tokens_per_step = round(tokens / max(1, sum(steps_per_epoch)))
    rows = config.training.micro_batch_size * config.data.max_seq_len
    flops = flops_per_token(matrices(module))
    workers = config.cluster.max_workers
    if tokens_per_second is None:
        peak = matmul_peak_flops(precision, device) * (workers if device.type == "cuda" else 1)
        rate, rate_source = utilisation * peak / flops, f"MFU {utilisation:g} of {peak / 1e12:.3g} TFLOP/s"
    else:
        rate, rate_source = tokens_per_second, "as given"
    limit, limit_source = _limit(device, workers, memory_gib)
    longest = max(1, round(float(found.lengths.mean()))) if len(found.lengths) else rows
    table = memory_table(
        module,
        config,
        tokens=rows,
        loss_tokens=max(1, round(rows * found.loss_share)),
        sequences=max(1, rows // longest),
        precision=precision,
        on_gpu=device.type != "cpu",
    )
    program = PROGRAM_BYTES if device.type == "cpu" else 0
    run_tokens = round(tokens_per_step * steps)
    return Plan(
        model=config.model.path,
        method=config.training.method,
        strategy=layout_of(config).name,
        workers=workers,
        device=device.type,
        precision=precision,
        parameters=sum(p.numel() for p in module.parameters()),
        trainable_parameters=trainable,
        data_source=found.source,
        sequences=len(found.lengths),
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        tokens=run_tokens,
        tokens_per_step=tokens_per_step,
        loss_share=found.loss_share,
        rates=_rates(config, steps),
        flops_per_token=flops,
        flops=float(flops) * run_tokens,
        tokens_per_second=rate,
        rate_source=rate_source,
        seconds=run_tokens / rate,
        limit_bytes=limit,
        limit_source=limit_source,
        program_bytes=program,
        memory=tuple(_judged(row, device, limit, program) for row in table),
    )


def _check_options(tokens_per_second: float | None, utilisation: float, memory_gib: float | None) -> None:
    for name, value in (("tokens_per_second", tokens_per_second), ("memory_gib", memory_gib)):
        if value is not None and not value > 0:
            raise ConfigError(name, f"{value} is not above 0.")
    if not 0 < utilisation <= 1:
        raise ConfigError("utilisation", f"{utilisation} is not between 0 and 1.")


def _device(config: TrainConfig) -> torch.device:
    gpu = torch.cuda.is_available() and config.cluster.use_gpu is not False
    return torch.device("cuda", 0) if gpu else torch.device("cpu")


def _meta_module(config: TrainConfig) -> tuple[LossModule, int]:
    """The module as a step has it, on the meta device, and how many of its parameters the run trains in all."""
    from raylm.models.attention import resolve_attention
    from raylm.models.load import structure_of
    from raylm.training.prepare import prepared

    model = structure_of(config.model).float()
    model.set_attn_implementation(resolve_attention("segments", torch.device("cpu")))
    model.config.use_cache = False
    with torch.device("meta"):
        module = LossModule(prepared(model, config), config.loss)
    trainable = sum(parameter.numel() for _, parameter in module.trainable())
    if config.training.method == "lisa":
        lisa = Lisa(config.lisa_or_default, module.model, module.trainable(), seed=config.run.seed)
        active = lisa.names(0)
        for name, parameter in module.trainable():
            parameter.requires_grad_(name in active)
    return module, trainable


def _steps(config: TrainConfig, found: Survey) -> tuple[tuple[int, ...], int, int]:
    """Steps of each epoch that is reached, steps of the run, tokens of these epochs."""
    lengths, weights = found.lengths, found.weights
    scale = 1.0
    if not found.exact and len(lengths) > SAMPLE_SEQUENCES:
        scale = len(lengths) / SAMPLE_SEQUENCES
        place = torch.linspace(0, len(lengths) - 1, SAMPLE_SEQUENCES).long().numpy()
        lengths, weights = lengths[place], None if weights is None else weights[place]
    if scale == 1.0:
        order = order_of(config, lengths, weights)
        epochs = tuple(order.steps_in_epoch(epoch) for epoch in range(len(order.epochs)))
        return epochs, order.num_steps, sum(int(lengths[epoch.sequences].sum()) for epoch in order.epochs)
    one = config.model_copy(
        update={"training": config.training.model_copy(update={"num_epochs": 1, "max_steps": None})}
    )
    epoch = order_of(one, lengths, weights).epochs[0]
    in_epoch = -(-round(epoch.num_rows * scale) // config.training.global_batch_size)
    reached = config.training.num_epochs
    if config.training.max_steps is not None:
        reached = min(reached, -(-config.training.max_steps // in_epoch))
    steps = min(in_epoch * reached, config.training.max_steps or in_epoch * reached)
    return (in_epoch,) * reached, steps, round(int(lengths[epoch.sequences].sum()) * scale) * reached


def _rates(config: TrainConfig, steps: int) -> tuple[tuple[int, float], ...]:
    """Step (from 1) and learning rate: the first, the first at the peak, the middle one, the last."""
    if not steps:
        return ()
    rate = config.optimizer.learning_rate
    values = [rate * learning_rate_factor(config.schedule, step, steps) for step in range(steps)]
    shown = {0, values.index(max(values)), steps // 2, steps - 1}
    return tuple((step + 1, values[step]) for step in sorted(shown))


def _limit(device: torch.device, workers: int, memory_gib: float | None) -> tuple[int, str]:
    if memory_gib is not None:
        return round(memory_gib * 2**30), "as given"
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory), torch.cuda.get_device_name(device)
    import psutil

    return psutil.virtual_memory().total // workers, f"this machine's memory for each of {workers}"


def _judged(row: Memory, device: torch.device, limit: int, program: int) -> Memory:
    needs = row.peak + (row.host + program if device.type == "cpu" else 0)
    return replace(row, fits=needs <= limit)
