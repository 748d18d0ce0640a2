"""Runs a session's trials on Ray Tune: its searcher numbers them, its callback notes what they report."""

import os
import time
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from raylm.ray_session import environment_variables
from raylm.training.ray_trainer import free_group
from raylm.training.run_dir import RunDir
from raylm.tuning.plans import Extent, SweepJob
from raylm.tuning.schedulers import WAITING, make_scheduler
from raylm.tuning.session import Session
from raylm.tuning.trainable import SweepTrial

HEAD = "node:__internal_head__"
"""The resource that the head node of every Ray cluster has 1 of. Trials' own processes, which only start workers and
read files, run there; Tune counts trials by their shares of it."""
_PENDING, _MADE_AT_ONCE = "TUNE_MAX_PENDING_TRIALS_PG", 64
_TUNE_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # it prints though it is told not to
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # tuning/run.py has one
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # nothing is restored from Tune's own snapshots
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
}


def run_on_tune(session: Session, job: SweepJob, extent: Extent, *, concurrency: int) -> None:
    """Runs trials until the session has no more. extent: how far they go."""
    section = session.config.scheduler
    waits = section.name in WAITING
    scheduler = make_scheduler(
        section,
        mode=session.config.mode,
        extent=extent,
        state=session.state,
        again=session.going_on,
        seed=session.config.seed,
        report=session.note,
        exchange=session.exchange,
    )
    share = int(0.99 / concurrency * 10_000) / 10_000 if waits else 0.0001  # the head has 1: room for no trial more
    trainable = tune.with_resources(
        tune.with_parameters(SweepTrial, job=job), tune.PlacementGroupFactory([{"CPU": 0, HEAD: share}])
    )
    made = _MADE_AT_ONCE if session.num_trials is None else min(session.num_trials, _MADE_AT_ONCE)
    # One, by itself: the trials of a bracket would not know each other.
    pending = {_PENDING: str(made)} if section.name == "hyperband" else {}
    with environment_variables({**_TUNE_ENVIRONMENT, **pending}):
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=_Numbers(session, None if waits else concurrency),
                scheduler=scheduler,
                num_samples=-1,
                # A process is used again by the next trial, but not while a paused one has something in it.
                reuse_actors=not waits,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=tune.RunConfig(
                name=f"tune-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
                storage_path=str(session.sweep_dir / "ray"),
                stop=_Over(session),
                callbacks=[_Notes(session)],
                failure_config=tune.FailureConfig(max_failures=0),
                verbose=0,
            ),
        )
        try:
            tuner.fit()
        except tune.TuneError:
            if session.problem is not None:  # which Tune has made a traceback of
                raise session.problem from None
            raise
    for trial in session.state.trials.values():
        if trial.state == "running":  # ended by the budget or by a signal, and perhaps by force
            free_group(RunDir(session.trial_dir(trial.number)))


def _trial_name(trial: Any) -> str:
    return f"{trial.config['number']:04d}-{trial.trial_id}"


class _Numbers(Searcher):
    """Gives Tune the numbers of trials; their settings are in their plans."""

    def __init__(self, session: Session, at_once: int | None) -> None:
        super().__init__()
        self._session, self._at_once = session, at_once
        self._live: set[str] = set()

    def suggest(self, trial_id: str) -> Any:
        if self._at_once is not None and len(self._live) >= self._at_once:
            return None
        number = self._session.next_trial()
        if number is None:
            return Searcher.FINISHED
        self._live.add(trial_id)
        return {"number": number}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._live.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """The journal is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """The journal is the state."""


class _Notes(tune.Callback):
    """Writes down what trials report, before anything follows from it."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        self._session.reported(trial.config["number"], result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        number = trial.config["number"]
        self._session.ended(number, "finished" if trial.last_result.get("ended") else "stopped")
        self._session.free_disk()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        free_group(RunDir(self._session.trial_dir(trial.config["number"])))
        error = trial.get_error()
        lines = [line for line in str(error).splitlines() if line.strip()] if error else []
        self._session.failed(trial.config["number"], lines[-1] if lines else "its process was lost")


class _Over(tune.Stopper):
    """Ends everything when the budget is used up."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._session.is_over()
