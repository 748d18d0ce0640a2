"""The run directory: everything a run produces lies under it, and it belongs to one run."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from raylm.config import TrainConfig, dump_yaml
from raylm.errors import RunDirError
from raylm.ray_session import inside_ray_job

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths of a run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def fetched(self) -> Path:
        """Checkpoints of other runs that were fetched from object storage."""
        return self.path / "fetched"

    @property
    def export(self) -> Path:
        """The exported model."""
        return self.path / "export"

    @property
    def adapter(self) -> Path:
        """The exported adapter of a LoRA run."""
        return self.path / "adapter"

    @property
    def ray(self) -> Path:
        """Ray Train's own records."""
        return self.path / "ray"

    @property
    def failure(self) -> Path:
        """What a worker stopped for, when it was the user's to mend."""
        return self.path / "failure.json"

    @property
    def profile(self) -> Path:
        """Traces of `training.profile_steps`, one a rank."""
        return self.path / "profile"

    @property
    def ranks(self) -> Path:
        """Signs of life of the workers."""
        return self.path / "ranks"

    @property
    def placement_group(self) -> Path:
        """The hexadecimal id of the placement group that the workers have, where nobody but the caller frees it."""
        return self.path / "placement_group"

    @property
    def stuck(self) -> Path:
        """Which rank held the others up, when one did last."""
        return self.path / "stuck.txt"

    @property
    def stopped(self) -> Path:
        """Why the run ended before its last step."""
        return self.path / "stopped.txt"


_BEFORE_STEPS = frozenset(
    (
        CONFIG_FILE,
        "data.json",
        "data-eval.json",
        "events.jsonl",
        "rejected.jsonl",
        "rejected-eval.jsonl",
        "failure.json",
        "stuck.txt",
        "stopped.txt",
        "stop",
        "hosts",
        "ranks",
        "ray",
        "report.html",
        "report.md",
    )
)


def _has_steps(run: RunDir) -> bool:
    """False for a run that ended before its first step, in a folder without anything else: there is nothing to lose."""
    return any(path.name not in _BEFORE_STEPS for path in run.path.iterdir())


def locate_run_dir(config: TrainConfig) -> Path:
    """The absolute run directory. Raises RunDirError for a relative one inside a Ray job without a storage path:
    a job's current folder is a temporary copy."""
    path = Path(config.run.dir).expanduser()
    if path.is_absolute():
        return path
    if config.run.storage_path:
        base = Path(config.run.storage_path).expanduser()
        if not base.is_absolute():
            raise RunDirError("run.storage_path", f"{config.run.storage_path} is not absolute.", "Give a full path.")
        return base / path
    if inside_ray_job():
        raise RunDirError(
            "run.dir",
            f"{config.run.dir} is relative, and a Ray job runs in a temporary folder.",
            "Give an absolute run.dir, or set run.storage_path.",
        )
    return Path.cwd() / path


def check_run_dir(config: TrainConfig) -> RunDir:
    """The run directory, untouched. Raises RunDirError when it is not a raylm run's, or holds another run."""
    run = RunDir(locate_run_dir(config))
    path = run.path
    if path.exists() and not path.is_dir():
        raise RunDirError(str(path), "is a file.", "Choose another run.dir.")
    occupied = path.is_dir() and any(path.iterdir())
    if occupied and not (path / CONFIG_FILE).is_file():
        raise RunDirError(str(path), "is a folder that holds something else than a run.", "Choose another run.dir.")
    if occupied and not config.training.resume and not config.run.overwrite and _has_steps(run):
        raise RunDirError(
            str(path),
            "holds another run.",
            "Choose another run.dir, continue it with training.resume=auto, or replace it with run.overwrite=true.",
        )
    return run


def open_run_dir(config: TrainConfig) -> RunDir:
    """Creates the run directory, or opens it for resuming, and writes the resolved configuration into it.

    Raises RunDirError when it is not writable, is not a raylm run's, or holds another run.
    """
    run = check_run_dir(config)
    path = run.path
    if path.is_dir() and any(path.iterdir()) and not config.training.resume:
        shutil.rmtree(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        partial = path / f".{CONFIG_FILE}.{os.getpid()}"
        partial.write_text(dump_yaml(config), encoding="utf-8")
        partial.rename(path / CONFIG_FILE)
        run.failure.unlink(missing_ok=True)
        run.stopped.unlink(missing_ok=True)
        run.stuck.unlink(missing_ok=True)
    except OSError as error:
        raise RunDirError(str(path), f"cannot be written: {error.strerror}.", "Choose another run.dir.") from None
    return run
