"""A training run from its configuration to an exported model: the driver's side of `raylm.train`."""

import hashlib
import json
import logging
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm.config import TrainConfig
from raylm.data.plan import RunPlan
from raylm.data.remote import scheme_of, shown
from raylm.errors import CheckpointError
from raylm.optim.schedules import learning_rate_factor
from raylm.ray_session import ray_session
from raylm.training.before_start import check_before_start, with_absolute_paths
from raylm.training.checkpoint import check_identity, newest_checkpoint, read_meta
from raylm.training.datasets import PreparedData, order_of, prepare_data
from raylm.training.metrics import EventsWriter, final_figures, plot_losses
from raylm.training.mirror import fetch, newest_in_mirror
from raylm.training.progress import watch_run
from raylm.training.report.write import write_report
from raylm.training.run_dir import RunDir, check_run_dir, open_run_dir
from raylm.training.sinks.follow import send_figures
from raylm.training.stopping import DESCRIPTIONS, Stop, stop_on_sigterm

if TYPE_CHECKING:
    from raylm.training.job import WorkerJob

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run left behind. metrics: the figures of the last step, such as `train/loss` and `eval/loss`;
    seconds: wall time of each phase; data: rows read, used, and rejected by reason."""

    run_dir: str
    export_dir: str | None
    adapter_dir: str | None
    steps: int
    """Steps done; fewer than planned when the run was stopped."""
    stopped: str | None
    """Why the run ended before its last step; None when it did not."""
    metrics: dict[str, Any]
    data: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    report: str = ""
    """The run's report.html."""


def run_training(config: TrainConfig) -> TrainResult:
    """Trains as configured and returns where everything lies.

    Faults of the configuration, the data files, the model's settings and the run directory are raised before Ray
    starts or a model loads. Raises RaylmError.
    """
    clock = _Clock()
    deadline = None if config.training.max_time_s is None else time.time() + config.training.max_time_s
    config = with_absolute_paths(config)
    check_run_dir(config)
    tokenizer_source = check_before_start(config)
    run = open_run_dir(config)
    events = EventsWriter(run.path)
    local_cpus = max(os.cpu_count() or 1, config.cluster.max_workers * (config.cluster.cpus_per_worker or 1) + 1)
    with watch_run(run.path), _session(config, local_cpus, events) as ray:
        from raylm.models.attention import check_attention
        from raylm.models.kernels import check_kernels
        from raylm.training.hardware import check_fp16
        from raylm.training.ray_trainer import TrainData, fit, plan_resources

        resources = plan_resources(config, ray.cluster_resources())
        check_attention(config.model.attention, on_gpu=resources.use_gpu)
        check_kernels(config.model.kernels, on_gpu=resources.use_gpu)
        if config.training.precision == "fp16":
            check_fp16(on_gpu=resources.use_gpu)
        clock.lap("start_ray")
        events.write("tokenising")
        data = prepare_data(config, tokenizer_source, run.path)
        plan = order_of(config, data.store.lengths, data.store.weights)
        job = replace(make_job(config, run, data, plan), deadline=deadline)
        clock.lap("tokenise")
        with stop_on_sigterm(run.path), send_figures(config, run.path) as following:
            fit(job, TrainData(ray.put(data.store), ray.put(plan), data.evaluation), resources)
            events.write("closing the sinks")
        clock.lap("train")
    plot_losses(run.path, run.path / "loss.png")
    stopped = run.stopped.read_text() if run.stopped.is_file() else None
    if following.failure and stopped == DESCRIPTIONS[Stop.REQUESTED]:
        stopped = following.failure
        run.stopped.write_text(stopped)
    events.write("stopped" if stopped else "done", **({"reason": stopped} if stopped else {}))
    written = write_report(run.path)
    asked = stopped is not None and stopped in (DESCRIPTIONS[Stop.REQUESTED], following.failure)
    exported = config.export.enabled and not asked
    newest = newest_checkpoint(run.checkpoints)
    return TrainResult(
        run_dir=str(run.path),
        export_dir=str(run.export) if exported else None,
        adapter_dir=str(run.adapter) if exported and config.method.adapter else None,
        steps=read_meta(newest).step if newest else plan.num_steps,
        stopped=stopped,
        metrics=final_figures(run.path),
        data=data.report.summary(),
        seconds=clock.laps,
        report=written.html,
    )


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 2)
        self._last = now


def _session(config: TrainConfig, local_cpus: int, events: EventsWriter) -> Any:
    events.write("starting Ray")
    return ray_session(config.cluster.address, num_cpus=local_cpus)


def make_job(config: TrainConfig, run: RunDir, data: PreparedData, plan: RunPlan) -> "WorkerJob":
    """What the workers of a run are told; writes data.json and looks for the checkpoint to go on from.

    plan: the order over these data. Raises CheckpointError.
    """
    from raylm.training.job import WorkerJob

    summary = {**data.report.summary(), "files": list(data.store.file_names), "num_steps": plan.num_steps}
    told = run.path / "data.json"
    former = json.loads(told.read_text()).get("num_steps") if told.is_file() else None
    identity = identity_of(config, data)
    start_from = _resume_point(config, run, identity)
    told.write_text(json.dumps(summary, indent=1))
    if start_from:
        where = where_it_goes_on(config, read_meta(start_from).step, plan.num_steps, former)
        logger.info("continuing from %s: %s", start_from, where)
    steps_per_epoch = tuple(plan.steps_in_epoch(epoch) for epoch in range(len(plan.epochs)))
    return WorkerJob(config, run, plan.num_steps, steps_per_epoch, identity, start_from)


def identity_of(config: TrainConfig, data: PreparedData) -> dict[str, Any]:
    """What resuming may not change: everything that the numbers of a step depend on, and the data themselves."""
    tree = config.model_dump(mode="json")
    rows = hashlib.sha256(data.store.lengths.tobytes() + str(data.report.loss_tokens).encode())
    identity = {
        "model.path": tree["model"]["path"],
        "model.rope": tree["model"]["rope"],
        "run.seed": tree["run"]["seed"],
        "data.max_seq_len": tree["data"]["max_seq_len"],
        "data.packing": tree["data"]["packing"],
        "data.shuffle": tree["data"]["shuffle"],
        "data.template": tree["data"]["template"],
        "data.loss_on": tree["data"]["loss_on"],
        "data.train (weights)": [source["weight"] for source in tree["data"]["train"]],
        "training.method": tree["training"]["method"],
        "training.freeze": tree["training"]["freeze"] or None,
        "training.global_batch_size": tree["training"]["global_batch_size"],
        "optimizer": tree["optimizer"],
        "schedule": tree["schedule"],
        "loss": tree["loss"],
        "training.ema_decay": tree["training"]["ema_decay"],
        "lisa": config.lisa_or_default.model_dump(mode="json") if config.training.method == "lisa" else None,
        "lora": config.lora_or_default.model_dump(mode="json") if config.method.adapter else None,
        "data (its rows)": rows.hexdigest(),
    }
    return dict(json.loads(json.dumps(identity)))


def _resume_point(config: TrainConfig, run: RunDir, identity: dict[str, Any]) -> Path | None:
    resume = config.training.resume
    if resume is None:
        return None
    if resume != "auto":
        path = fetch(resume, run.fetched) if scheme_of(resume) else Path(resume).expanduser().resolve()
        check_identity(path, read_meta(path), identity)
        newest = newest_checkpoint(run.checkpoints)
        if newest is not None and newest.resolve() != path:
            raise CheckpointError(
                str(path),
                f"{run.path} holds its own checkpoints, the newest {newest.name}, which this run would mix with.",
                "Choose a new run.dir to branch off, or training.resume=auto to go on from the newest.",
            )
        return path
    newest = newest_checkpoint(run.checkpoints)
    mirror = config.checkpoint.mirror
    if newest is None and mirror and (mirrored := newest_in_mirror(mirror)):
        logger.info("%s holds no checkpoint: fetching %s", run.path, shown(mirrored))
        newest = fetch(mirrored, run.checkpoints)
    if newest is None:
        if run.checkpoints.is_dir() and any(run.checkpoints.glob("step-*")):
            raise CheckpointError(
                str(run.checkpoints), "holds no complete checkpoint.", "Start again in a new run.dir."
            )
        logger.warning("%s holds no checkpoint yet: starting from the base model", run.path)
        return None
    check_identity(newest, read_meta(newest), identity)
    return newest


def where_it_goes_on(config: TrainConfig, step: int, num_steps: int, former: int | None) -> str:
    """What comes after `step` steps of a resumed run: the next step and its learning rate, and what that would have
    been where the run has another length than it was planned with, `former`."""
    planned = f"{num_steps} steps" if former in (None, num_steps) else f"{num_steps} steps, formerly {former}"
    if step >= num_steps:
        return f"all of {planned} are done"

    def rate(length: int) -> str:
        return f"{config.optimizer.learning_rate * learning_rate_factor(config.schedule, step, length):.3g}"

    line = f"step {step + 1} of {planned}, learning rate {rate(num_steps)}"
    if former is not None and former != num_steps and rate(former) != rate(num_steps):
        line += f" by the schedule of the new length ({rate(former)} by the former)"
    return line
