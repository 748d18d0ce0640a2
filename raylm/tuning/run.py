"""A sweep from its configuration to its best model: the driver's side of `raylm.sweep`."""

import fcntl
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raylm.config import SweepConfig, TrainConfig, load_config
from raylm.errors import ConfigError, RaylmError, RunDirError
from raylm.ray_session import inside_ray_job, is_local, ray_session
from raylm.tuning.candidates import Candidates, check_scheduler_steps, with_base
from raylm.tuning.journal import JOURNAL_FILE, Journal, SweepState, read_journal
from raylm.tuning.plans import Extent, SweepJob, data_key, progress
from raylm.tuning.results import SweepResult, finish_sweep
from raylm.tuning.room import local_cpus, plan_room
from raylm.tuning.search import Search, make_search
from raylm.tuning.session import Session

logger = logging.getLogger(__name__)

SWEEP_FILE = "sweep.yaml"
LOCK_FILE = ".lock"
_MOST_DATASETS = 16
"""Prepared before the first trial; what else the space holds is prepared by the first trial that needs it."""
_MAY_CHANGE = ("budget", "concurrency", "resources", "keep", "export_best", "retrain_best", "retrain_set")
"""What a resumed sweep may have another value of."""


@dataclass(frozen=True, slots=True)
class SweepOutline:
    """What a sweep would do. trials: None where time or tokens decide."""

    sweep_dir: str
    metric: str
    mode: str
    trials: int | None
    first: list[dict[str, Any]]
    """Settings of the first trials; optuna chooses those after its start-up by what came before."""


def outline_sweep(config: SweepConfig, source: str = "") -> SweepOutline:
    """Makes all checks of a sweep and starts nothing. source: file of the configuration, which errors name. Raises
    RaylmError."""
    _check_free(_locate(config))
    candidates, search = _checked(config, _locate(config), source)
    limits = [limit for limit in (config.budget.trials, search.size) if limit is not None]
    trials = min(limits, default=None)
    shown = [search.suggest(number, SweepState()) for number in range(min(trials or 8, 8))]
    settings = [one for one in shown if one is not None]
    return SweepOutline(str(candidates.sweep_dir), candidates.metric_name, config.mode, trials, settings)


def run_sweep(config: SweepConfig, source: str = "") -> SweepResult:
    """Runs a new sweep. source: file of the configuration, which errors name. Raises RaylmError for what is wrong,
    before Ray starts where the configuration shows it."""
    sweep_dir = _locate(config)
    _check_free(sweep_dir)
    candidates, search = _checked(config, sweep_dir, source)
    try:
        sweep_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirError(str(sweep_dir), f"cannot be written: {error.strerror}.", "Choose another dir.") from None
    with _alone(sweep_dir):
        _check_free(sweep_dir)  # again: another may have begun there meanwhile
        # One that ended before its first trial may have begun in another folder, which its journal names.
        (sweep_dir / JOURNAL_FILE).unlink(missing_ok=True)
        _write_config(sweep_dir, candidates.config)
        return _run(candidates, search, source, retry_failed=False)


def _check_free(sweep_dir: Path) -> None:
    """Raises RunDirError for a folder with something in it; a sweep that ended before its first trial is nothing."""
    if not sweep_dir.exists():
        return
    if not (sweep_dir / SWEEP_FILE).is_file():
        if not sweep_dir.is_dir() or any(path.name != LOCK_FILE for path in sweep_dir.iterdir()):
            raise RunDirError(str(sweep_dir), "holds something else than a sweep.", "Choose another dir.")
    elif read_journal(sweep_dir).trials:
        raise RunDirError(
            str(sweep_dir),
            "holds another sweep.",
            f"Choose another dir, or continue it with raylm sweep --resume {sweep_dir}.",
        )


def resume_sweep(
    sweep_dir: str | Path, overrides: Any = (), *, config: SweepConfig | None = None, retry_failed: bool = False
) -> SweepResult:
    """Continues a sweep: no trial that has ended runs again, those that have not go on from their newest checkpoints.

    overrides: of what may change, such as `budget.trials`. config: the file again, which must say the same.
    retry_failed: failed trials go on as well. Raises RaylmError.
    """
    folder = Path(sweep_dir).expanduser().resolve()
    if not (folder / SWEEP_FILE).is_file():
        raise RunDirError(str(folder), "holds no sweep.", "Give the dir of one.")
    with _alone(folder), _where_it_began(read_journal(folder).folder):
        return _resume(folder, overrides, config, retry_failed=retry_failed)


@contextmanager
def _where_it_began(began: str) -> Iterator[None]:
    """Relative paths mean what they meant to the first driver, from whatever folder the sweep goes on."""
    if not began or began == os.getcwd():
        yield
    elif Path(began).is_dir():
        logger.info("relative paths are read from %s, where the sweep began", began)
        with chdir(began):
            yield
    else:
        logger.warning("%s, where the sweep began, is gone: relative paths are read from here", began)
        yield


def _resume(folder: Path, overrides: Any, config: SweepConfig | None, *, retry_failed: bool) -> SweepResult:
    former = load_config(SweepConfig, folder / SWEEP_FILE)
    resumed = load_config(SweepConfig, folder / SWEEP_FILE if config is None else with_base(config), overrides)
    for name in SweepConfig.model_fields:
        if name not in (*_MAY_CHANGE, "dir") and getattr(former, name) != getattr(resumed, name):
            raise ConfigError(
                f"{folder}: {name}",
                "differs from what the sweep began with.",
                f"Set it back, or begin a new sweep. What may change: {', '.join(_MAY_CHANGE)}.",
            )
    source = str(folder / SWEEP_FILE)
    candidates, search = _checked(resumed, folder, source)
    _write_config(folder, resumed)
    return _run(candidates, search, source, retry_failed=retry_failed)


def _write_config(sweep_dir: Path, config: SweepConfig) -> None:
    partial = sweep_dir / f".{SWEEP_FILE}"
    tree = config.model_dump(mode="json", exclude_unset=True)
    partial.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
    partial.rename(sweep_dir / SWEEP_FILE)


def _locate(config: SweepConfig) -> Path:
    path = Path(config.dir).expanduser()
    if not path.is_absolute() and inside_ray_job():
        raise RunDirError(
            "dir", f"{config.dir} is relative, and a Ray job runs in a temporary folder.", "Give a full path."
        )
    return Path(os.path.abspath(path))


def _checked(config: SweepConfig, sweep_dir: Path, source: str) -> tuple[Candidates, Search]:
    with _in_file(source):
        candidates = Candidates(config, sweep_dir)
        candidates.check()
        return candidates, make_search(candidates)


@contextmanager
def _in_file(source: str) -> Iterator[None]:
    """Faults are those of this file."""
    try:
        yield
    except RaylmError as error:
        if not source or error.where.startswith(source):
            raise
        raise type(error)(f"{source}: {error.where}", error.problem, error.remedy) from None


def _run(candidates: Candidates, search: Search, source: str, *, retry_failed: bool) -> SweepResult:
    sweep_dir = candidates.sweep_dir
    started = time.monotonic()
    built = _known_configs(candidates)
    journal = Journal(sweep_dir)
    try:
        interrupted = _run_trials(candidates, search, journal, built, source, retry_failed=retry_failed)
        return finish_sweep(candidates, journal.state, interrupted=interrupted, started=started)
    finally:
        journal.close()


def _run_trials(
    candidates: Candidates,
    search: Search,
    journal: Journal,
    built: Sequence[TrainConfig],
    source: str,
    *,
    retry_failed: bool,
) -> bool:
    config, address = candidates.config, built[0].cluster.address
    num_cpus = local_cpus(built, config.concurrency) if is_local(address) else 1
    with ray_session(address, num_cpus=num_cpus) as ray:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        with _in_file(source):
            room = plan_room(built, config.resources, config.concurrency, nodes)
        session = Session(candidates, search, journal, room, retry_failed=retry_failed)
        if not session.has_more():
            logger.info("no trial is left to run")
            return False
        data = _prepare(candidates, built)
        extent = extent_of(candidates, built, data)
        with _in_file(source):
            check_scheduler_steps(config.scheduler, extent.max_steps)
        from raylm.tuning.progress import watch_sweep
        from raylm.tuning.tune_run import run_on_tune

        job = SweepJob(str(candidates.sweep_dir), data, extent.unit)
        try:
            with _end_on_signal(session), watch_sweep(session):
                run_on_tune(session, job, extent, concurrency=room.concurrency)
        finally:
            session.close()
        return session.interrupted


def _known_configs(candidates: Candidates) -> list[TrainConfig]:
    """Trainings of the sweep: all of a grid, else the corners of its space."""
    points = candidates.points() if candidates.config.search.name == "grid" else candidates.corners()
    return [candidates.build(number, settings) for number, settings in enumerate(points)]


def _prepare(candidates: Candidates, built: Sequence[TrainConfig]) -> dict[str, Any]:
    """Tokenises what the trials will read, once: prepared data by key."""
    from raylm.training.before_start import check_before_start, with_absolute_paths
    from raylm.training.datasets import prepare_data

    found: dict[str, Any] = {}
    for config in built:
        key = data_key(with_absolute_paths(config))
        if key not in found and len(found) < _MOST_DATASETS:
            absolute = with_absolute_paths(config)
            folder = candidates.sweep_dir / "data" / key
            folder.mkdir(parents=True, exist_ok=True)
            found[key] = prepare_data(absolute, check_before_start(absolute), folder)
    return found


def extent_of(candidates: Candidates, built: Sequence[TrainConfig], data: Mapping[str, Any]) -> Extent:
    """How far the trainings of a sweep go: epochs, batches, data and lengths may all differ. data: prepared, by key;
    trainings over others are left out."""
    from raylm.training.before_start import with_absolute_paths
    from raylm.training.datasets import order_of

    plans: dict[str, tuple[int, float]] = {}
    intervals: dict[str, int | None] = {}
    for config in built:
        key = data_key(with_absolute_paths(config))
        if key not in data:
            continue
        training = (config.training.num_epochs, config.training.max_steps, config.training.global_batch_size)
        kind = f"{key} {config.data.packing} {training} {candidates.report_interval(config)}"
        if kind not in plans:
            store = data[key].store
            plan = order_of(config, store.lengths, store.weights)
            plans[kind] = plan.num_steps, plan.tokens_per_step(store.lengths)
            intervals[kind] = candidates.report_interval(config)
    unit = min(tokens for _, tokens in plans.values())
    known = [progress(every, plans[kind][1], unit) for kind, every in intervals.items() if every]
    return Extent(
        round(max(progress(steps, tokens, unit) for steps, tokens in plans.values())), min(known, default=None), unit
    )


@contextmanager
def _alone(sweep_dir: Path) -> Iterator[None]:
    """One driver at a time. Raises RunDirError; a driver that died holds nothing."""
    try:
        lock = (sweep_dir / LOCK_FILE).open("w")
    except OSError as error:
        raise RunDirError(str(sweep_dir), f"cannot be written: {error.strerror}.", "Choose another dir.") from None
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunDirError(str(sweep_dir), "is in use by another raylm sweep.", "Wait for it, or stop it.") from None
        yield


@contextmanager
def _end_on_signal(session: Session) -> Iterator[None]:
    """The first ctrl-c or SIGTERM ends the sweep with what it has; a second one ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: Any) -> None:
        session.interrupted = True
        logger.info("ending the sweep; it goes on with raylm sweep --resume %s", session.sweep_dir)
        for other, handler in former.items():
            signal.signal(other, handler or signal.SIG_DFL)

    for number in former:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler or signal.SIG_DFL)
