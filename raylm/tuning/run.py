"""A sweep from its configuration to its best model: the driver's side of `raylm.sweep`."""

import fcntl
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raylm.config import SweepConfig, TrainConfig, load_config
from raylm.errors import ConfigError, RunDirError
from raylm.ray_session import inside_ray_job, ray_session
from raylm.tuning.candidates import Candidates, with_base
from raylm.tuning.journal import Journal, SweepState, read_journal
from raylm.tuning.plans import SweepJob, data_key
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


def outline_sweep(config: SweepConfig) -> SweepOutline:
    """Makes all checks of a sweep and starts nothing. Raises RaylmError."""
    config = with_base(config)
    candidates, search = _checked(config, _locate(config))
    limits = [limit for limit in (config.budget.trials, search.size) if limit is not None]
    trials = min(limits, default=None)
    shown = [search.suggest(number, SweepState()) for number in range(min(trials or 8, 8))]
    settings = [one for one in shown if one is not None]
    return SweepOutline(str(candidates.sweep_dir), candidates.metric_name, config.mode, trials, settings)


def run_sweep(config: SweepConfig) -> SweepResult:
    """Runs a new sweep. Raises RaylmError for what is wrong, before Ray starts where the configuration shows it."""
    config = with_base(config)
    sweep_dir = _locate(config)
    _check_free(sweep_dir)
    candidates, search = _checked(config, sweep_dir)
    try:
        sweep_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirError(str(sweep_dir), f"cannot be written: {error.strerror}.", "Choose another dir.") from None
    with _alone(sweep_dir):
        _check_free(sweep_dir)  # again: another may have begun there meanwhile
        _write_config(sweep_dir, config)
        return _run(candidates, search, retry_failed=False)


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
    candidates, search = _checked(resumed, folder)
    _write_config(folder, resumed)
    return _run(candidates, search, retry_failed=retry_failed)


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


def _checked(config: SweepConfig, sweep_dir: Path) -> tuple[Candidates, Search]:
    candidates = Candidates(config, sweep_dir)
    candidates.check()
    return candidates, make_search(candidates)


def _run(candidates: Candidates, search: Search, *, retry_failed: bool) -> SweepResult:
    sweep_dir = candidates.sweep_dir
    started = time.monotonic()
    built = _known_configs(candidates)
    journal = Journal(sweep_dir)
    try:
        interrupted = _run_trials(candidates, search, journal, built, retry_failed=retry_failed)
        return finish_sweep(candidates, journal.state, interrupted=interrupted, started=started)
    finally:
        journal.close()


def _run_trials(
    candidates: Candidates, search: Search, journal: Journal, built: Sequence[TrainConfig], *, retry_failed: bool
) -> bool:
    config, address = candidates.config, built[0].cluster.address
    num_cpus = local_cpus(built, config.concurrency) if _is_local(address) else 1
    with ray_session(address, num_cpus=num_cpus) as ray:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = plan_room(built, config.resources, config.concurrency, nodes)
        session = Session(candidates, search, journal, room, retry_failed=retry_failed)
        if not session.has_more():
            logger.info("no trial is left to run")
            return False
        data = _prepare(candidates, built)
        from raylm.tuning.progress import watch_sweep
        from raylm.tuning.tune_run import run_on_tune

        max_steps = max(steps for _, steps in data.values())
        job = SweepJob(str(candidates.sweep_dir), {key: prepared for key, (prepared, _) in data.items()})
        try:
            with _end_on_signal(session), watch_sweep(session):
                run_on_tune(
                    session,
                    job,
                    interval=candidates.report_interval(built[0]),
                    max_steps=max_steps,
                    concurrency=room.concurrency,
                )
        finally:
            session.close()
        return session.interrupted


def _is_local(address: str | None) -> bool:
    import ray

    return not (ray.is_initialized() or address or os.environ.get("RAY_ADDRESS"))


def _known_configs(candidates: Candidates) -> list[TrainConfig]:
    """Trainings of the sweep: all of a grid, else the corners of its space."""
    points = candidates.points() if candidates.config.search.name == "grid" else candidates.corners()
    return [candidates.build(number, settings) for number, settings in enumerate(points)]


def _prepare(candidates: Candidates, built: Sequence[TrainConfig]) -> dict[str, tuple[Any, int]]:
    """Tokenises what the trials will read, once: prepared data and the most steps over them, by key."""
    from raylm.training.before_start import check_before_start, with_absolute_paths
    from raylm.training.datasets import order_of, prepare_data

    found: dict[str, tuple[Any, int]] = {}
    for config in built:
        key = data_key(with_absolute_paths(config))
        if key not in found and len(found) < _MOST_DATASETS:
            absolute = with_absolute_paths(config)
            folder = candidates.sweep_dir / "data" / key
            folder.mkdir(parents=True, exist_ok=True)
            data = prepare_data(absolute, check_before_start(absolute), folder)
            plan = order_of(absolute, data.store.lengths, data.store.weights)
            found[key] = data, plan.num_steps
    return found


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
