"""What a sweep leaves: results.csv, best.yaml, the best checkpoint and its model, the report."""

import csv
import io
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylm.config import TrainConfig, dump_yaml, load_config
from raylm.errors import RaylmError
from raylm.training.checkpoint import checkpoint_name
from raylm.training.run_dir import CONFIG_FILE
from raylm.tuning.candidates import Candidates
from raylm.tuning.journal import Report, SweepState, Trial
from raylm.tuning.pins import best_checkpoint, link_checkpoint
from raylm.tuning.tpe import objective_value

logger = logging.getLogger(__name__)

RESULTS_FILE, BEST_FILE, BEST_FOLDER = "results.csv", "best.yaml", "best"


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What a sweep left behind. best: number of the best trial; value, step: of its best report, whose checkpoint lies
    in `checkpoint`; states: number of trials by state; interrupted: whether it was asked to end."""

    sweep_dir: str
    metric: str
    best: int | None
    value: float | None
    step: int | None
    settings: dict[str, Any]
    checkpoint: str | None
    best_config: str | None
    export_dir: str | None
    retrained_dir: str | None
    states: dict[str, int]
    lacking: dict[str, list[int]]
    """Sink -> trials that it did not get all figures of."""
    results: str
    report: str
    interrupted: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class BestModel:
    """Where the best of a sweep lies."""

    config: str
    checkpoint: str | None
    export_dir: str | None
    retrained_dir: str | None


def write_results(candidates: Candidates, state: SweepState) -> Path:
    """results.csv: one line a trial, the best first, failed ones last."""
    config = candidates.config
    keys = setting_keys(state, candidates)
    extra = [objective.metric for objective in config.search.objectives]
    front = {trial.number for trial in pareto_front(candidates, state)}
    head = ["trial", "state", "value", "step", "last_value", "last_step", "tokens", "seconds", *extra]
    head += ["front"] if extra else []
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*head, *keys, "reason"])
    for trial in ranked(state, config.mode):
        best, last = trial.best(config.mode), trial.last
        figures = [objective_value(last, metric) if last else None for metric in extra]
        row = [trial.number, trial.state, *_pair(best), *_pair(last), trial.tokens, last.seconds if last else None]
        row += [*figures, *([trial.number in front] if extra else [])]
        settings = best.settings if best else trial.settings
        cells = [*row, *(_cell(settings[key]) if key in settings else None for key in keys), remark(trial)]
        writer.writerow(["" if cell is None else cell for cell in cells])
    path = candidates.sweep_dir / RESULTS_FILE
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(text.getvalue(), encoding="utf-8")
    partial.rename(path)
    return path


def remark(trial: Trial) -> str:
    """Why a trial failed or ended early, and which sinks lack figures of it."""
    lacking = (f"{sink} lacks figures ({problem})" for sink, problem in trial.lacking.items())
    return "; ".join(filter(None, [trial.reason, *lacking]))


def _pair(report: Report | None) -> list[Any]:
    return [report.value, report.step] if report else [None, None]


def _cell(value: Any) -> Any:
    return value if isinstance(value, int | float | str) and not isinstance(value, bool) else json.dumps(value)


def setting_keys(state: SweepState, candidates: Candidates) -> list[str]:
    """The settings that trials differ in, in the order of the space."""
    used = {key for trial in state.trials.values() for key in trial.settings}
    return [key for key in candidates.config.space if key in used]


def ranked(state: SweepState, mode: str) -> list[Trial]:
    """The trials by their best report, those without one last, failed ones behind others of the same value."""
    sign = 1 if mode == "min" else -1

    def rank(trial: Trial) -> tuple[bool, float, bool, int]:
        best = trial.best(mode)
        return best is None, sign * best.value if best else 0.0, trial.state == "failed", trial.number

    return sorted(state.trials.values(), key=rank)


def pareto_front(candidates: Candidates, state: SweepState) -> list[Trial]:
    """The trials that no other one is at least as good as in all objectives and better than in one."""
    config = candidates.config
    signs = [1 if mode == "min" else -1 for mode in (config.mode, *(one.mode for one in config.search.objectives))]
    points: dict[int, list[float]] = {}
    for trial in state.trials.values():
        best, last = trial.best(config.mode), trial.last
        if trial.state == "failed" or best is None or last is None:
            continue
        values = [best.value, *(objective_value(last, one.metric) for one in config.search.objectives)]
        if all(value is not None and math.isfinite(value) for value in values):
            points[trial.number] = [
                sign * value for sign, value in zip(signs, values, strict=True) if value is not None
            ]
    front = [
        number
        for number, point in points.items()
        if not any(
            all(a <= b for a, b in zip(other, point, strict=True)) and other != point for other in points.values()
        )
    ]
    return [state.trials[number] for number in front]


def best_config(candidates: Candidates, report: Report) -> TrainConfig:
    """A training with the best settings, that `raylm train` runs as it is, in a folder of its own."""
    from raylm.training.before_start import with_absolute_paths

    return with_absolute_paths(candidates.retraining(report.settings, {}))


def keep_best(candidates: Candidates, trial: Trial, report: Report) -> BestModel:
    """Writes best.yaml and puts the best checkpoint into best/, with its model if that is asked for."""
    sweep_dir = candidates.sweep_dir
    config = best_config(candidates, report)
    path = sweep_dir / BEST_FILE
    partial = path.with_suffix(f".{os.getpid()}")
    best = f"# The best of {sweep_dir.name}: trial {trial.number}, {report.value:.6g} at step {report.step}.\n"
    partial.write_text(best + dump_yaml(config), encoding="utf-8")
    partial.rename(path)
    pinned = best_checkpoint(candidates.trial_dir(trial.number), report.step, report.value)
    folder = sweep_dir / BEST_FOLDER
    target = folder / "checkpoints" / checkpoint_name(report.step)
    if pinned is None:
        logger.warning("the checkpoint of trial %d, step %d is gone", trial.number, report.step)
        return BestModel(str(path), None, None, None)
    shutil.rmtree(folder, ignore_errors=True)
    link_checkpoint(pinned, target)
    exported = candidates.config.export_best and _export(config, folder)
    return BestModel(str(path), str(target), str(folder / "export") if exported else None, None)


def _export(config: TrainConfig, folder: Path) -> bool:
    """In a process of its own, whose memory goes with it."""
    (folder / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "raylm.tuning.export", str(folder)], stdout=subprocess.DEVNULL)
    if done.returncode:
        logger.warning("the best checkpoint could not be exported: `raylm train best.yaml` makes its model anew")
    return done.returncode == 0


def retrain(candidates: Candidates, report: Report) -> str:
    """Trains the best settings again with `retrain_set`. Returns the run directory. Raises RaylmError."""
    from raylm.training.run import run_training

    return run_training(retrain_config(candidates, report)).run_dir


def retrain_config(candidates: Candidates, report: Report) -> TrainConfig:
    """What `retrain` trains: a former attempt at the same goes on, one at anything else is replaced."""
    from raylm.training.before_start import with_absolute_paths

    config = with_absolute_paths(candidates.retraining(report.settings, candidates.config.retrain_set))
    former = Path(config.run.dir) / CONFIG_FILE
    if not former.is_file():
        return config
    same = _training(load_config(TrainConfig, former)) == _training(config)
    return load_config(
        TrainConfig,
        config.model_dump(mode="json"),
        {"training.resume": "auto"} if same else {"training.resume": None, "run.overwrite": True},
    )


def _training(config: TrainConfig) -> dict[str, Any]:
    """What a training is, whether it begins or goes on."""
    return config.model_dump(mode="json", exclude={"training": {"resume"}, "run": {"overwrite"}})


def finish_sweep(candidates: Candidates, state: SweepState, *, interrupted: bool, started: float) -> SweepResult:
    """Writes everything and says where it lies."""
    from raylm.tuning.report import write_sweep_report

    found = state.best(candidates.config.mode)
    best = keep_best(candidates, *found) if found else None
    results = write_results(candidates, state)
    report = write_sweep_report(candidates, state)
    retrained = None
    if found is not None and candidates.config.retrain_best and not interrupted:
        try:
            retrained = retrain(candidates, found[1])
        except RaylmError as error:
            logger.warning("the best settings could not be trained again: %s", error)
            write_sweep_report(candidates, state, not_retrained=str(error))
    return SweepResult(
        sweep_dir=str(candidates.sweep_dir),
        metric=candidates.metric_name,
        best=found[0].number if found else None,
        value=found[1].value if found else None,
        step=found[1].step if found else None,
        settings=dict(found[1].settings) if found else {},
        checkpoint=best.checkpoint if best else None,
        best_config=best.config if best else None,
        export_dir=best.export_dir if best else None,
        retrained_dir=retrained,
        states=dict(Counter(trial.state for trial in state.trials.values())),
        lacking=_lacking(state),
        results=str(results),
        report=str(report),
        interrupted=interrupted,
        seconds=round(time.monotonic() - started, 1),
    )


def _lacking(state: SweepState) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for trial in state.trials.values():
        for sink in trial.lacking:
            found.setdefault(sink, []).append(trial.number)
    return found
