"""What the process that runs a trial is told: a JSON file for each trial, and the objects that all share."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raylm.config import TrainConfig

PLANS_FOLDER = "plans"
COPIES_FOLDER = "copies"


@dataclass(frozen=True, slots=True)
class TrialPlan:
    """One trial as its next start shall be. interval: steps between reports, None for one at the end; resources: of
    training/ray_trainer.py, as a mapping; objectives: further figures to report; reported: step of the last report."""

    number: int
    train: Mapping[str, Any]
    metric: str
    mode: str
    interval: int | None
    resources: Mapping[str, Any]
    objectives: tuple[str, ...]
    reported: int

    @property
    def config(self) -> TrainConfig:
        """The training configuration."""
        return TrainConfig.model_validate(self.train)


@dataclass(frozen=True, slots=True)
class SweepJob:
    """What all trials share. data: prepared datasets by `data_key`; unit: tokens of the smallest step that a trial is
    known to take, see `progress`."""

    sweep_dir: str
    data: Mapping[str, Any]
    unit: float


@dataclass(frozen=True, slots=True)
class Extent:
    """How far the trials of a sweep go, in steps of `unit` tokens (see `progress`). max_steps: of the longest;
    interval: between the reports of the one that reports most often, None for reports at the end only."""

    max_steps: int
    interval: float | None
    unit: float


def progress(step: int, step_tokens: float, unit: float) -> float:
    """How far a trial has come, in steps of `unit` tokens: what schedulers compare trials at. Equal to `step` where
    the steps of all trials are alike; one of larger batches or longer rows has come further by the same step."""
    return step * round(step_tokens / unit, 2) if step_tokens and unit else step


def plan_file(sweep_dir: Path, number: int) -> Path:
    """Where a trial's plan lies."""
    return sweep_dir / PLANS_FOLDER / f"{number:04d}.json"


def failure_file(sweep_dir: Path, number: int) -> Path:
    """Why a trial failed, in words."""
    return sweep_dir / PLANS_FOLDER / f"{number:04d}.failed"


def copy_folder(sweep_dir: Path, number: int) -> Path:
    """Holds the checkpoint of another trial that a trial is to go on from."""
    return sweep_dir / COPIES_FOLDER / f"{number:04d}"


def staged_copy(sweep_dir: Path, number: int, count: int) -> Path:
    """The same before the journal says it. count: the how many-th copy of the trial it is."""
    return copy_folder(sweep_dir, number).with_name(f"{number:04d}.{count}")


def take_copy(sweep_dir: Path, number: int, staged: Path) -> None:
    """The journal has it: the trial's next start finds it."""
    folder = copy_folder(sweep_dir, number)
    shutil.rmtree(folder, ignore_errors=True)
    staged.rename(folder)


def settle_copies(sweep_dir: Path, copies: Mapping[int, int]) -> None:
    """Ends what a killed driver had begun: takes a staged copy that the journal has, deletes one that it has not.
    copies: how many each trial has in the journal."""
    for staged in (sweep_dir / COPIES_FOLDER).glob("*.*"):
        number, _, count = staged.name.partition(".")
        if copies.get(int(number)) == int(count):
            take_copy(sweep_dir, int(number), staged)
        else:
            shutil.rmtree(staged)


def write_plan(sweep_dir: Path, plan: TrialPlan) -> None:
    """Writes a plan for the trial's next start, and forgets why it failed before."""
    path = plan_file(sweep_dir, plan.number)
    path.parent.mkdir(parents=True, exist_ok=True)
    failure_file(sweep_dir, plan.number).unlink(missing_ok=True)
    path.with_suffix(".partial").write_text(json.dumps(asdict(plan)))
    path.with_suffix(".partial").rename(path)


def read_plan(sweep_dir: Path, number: int) -> TrialPlan:
    """The plan of a trial."""
    found = json.loads(plan_file(sweep_dir, number).read_text())
    return TrialPlan(**{**found, "objectives": tuple(found["objectives"])})


def data_key(config: TrainConfig) -> str:
    """Equal for trainings whose tokenised rows and evaluation blocks are the same."""
    data = config.data.model_dump(mode="json", exclude={"shuffle", "cache"})
    seed = config.run.seed if config.data.sample < 1 else None
    parts = [data, config.model.path, config.model.revision, config.training.micro_batch_size, seed]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
