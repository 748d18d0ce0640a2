"""What a run directory tells of its run."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylm.config import TrainConfig, load_config
from raylm.errors import CheckpointError, ConfigError, RunDirError
from raylm.training.checkpoint import CheckpointMeta, list_checkpoints, read_meta
from raylm.training.environment import Host, read_hosts
from raylm.training.metrics import read_events, read_metrics
from raylm.training.run_dir import CONFIG_FILE, RunDir

FIRST_PHASE = "starting Ray"
LAST_PHASES = ("done", "stopped")


@dataclass(frozen=True, slots=True)
class RunFacts:
    """A run as far as it got. config: None when this raylm does not read it; settings_text: config.yaml as it stands;
    data: counts by `data.train` and `data.eval`; phases: phase -> seconds, over all sessions."""

    run: RunDir
    config: TrainConfig | None
    settings_text: str
    state: str
    events: Sequence[dict[str, Any]]
    metrics: Sequence[dict[str, Any]]
    data: dict[str, dict[str, Any]]
    checkpoints: Sequence[CheckpointMeta]
    hosts: Sequence[Host]
    phases: dict[str, float]

    def newest(self, key: str) -> Any:
        """The value of the last line of metrics.jsonl that has the figure."""
        return next((line[key] for line in reversed(self.metrics) if key in line), None)

    def event(self, key: str) -> Any:
        """The value of the last phase that told it."""
        return next((event[key] for event in reversed(self.events) if key in event), None)

    @property
    def best(self) -> CheckpointMeta | None:
        """The checkpoint with the lowest evaluation loss."""
        scored = [meta for meta in self.checkpoints if meta.eval_loss is not None]
        return min(scored, key=lambda meta: meta.eval_loss or 0.0) if scored else None


def read_facts(run_dir: Path) -> RunFacts:
    """Reads a run directory, of a run that goes on or died as well. Raises RunDirError for another folder."""
    run = RunDir(run_dir)
    if not (run_dir / CONFIG_FILE).is_file():
        raise RunDirError(str(run_dir), "holds no run.", "Give a run directory, such as runs/train.")
    events, metrics = read_events(run_dir), list(read_metrics(run_dir))
    return RunFacts(
        run=run,
        config=_config(run_dir),
        settings_text=(run_dir / CONFIG_FILE).read_text(encoding="utf-8"),
        state=_state(run, events),
        events=events,
        metrics=metrics,
        data=_data(run_dir),
        checkpoints=list(_checkpoints(run)),
        hosts=read_hosts(run_dir),
        phases=phase_seconds(events, metrics),
    )


def phase_seconds(events: Sequence[dict[str, Any]], metrics: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Wall time of each phase, in order of first appearance. The time between two sessions belongs to none: a killed
    session is taken to have ended with its last step or phase."""
    found: dict[str, float] = {}
    timed = [event for event in events if "time" in event]
    for place, event in enumerate(timed):
        following = timed[place + 1] if place + 1 < len(timed) else None
        if event["phase"] in LAST_PHASES:
            continue
        end = following["time"] if following else float("inf")
        if following is None or following["phase"] == FIRST_PHASE:
            steps = [line["time"] for line in metrics if event["time"] <= line.get("time", 0.0) <= end]
            end = max(steps, default=event["time"])
        found[event["phase"]] = found.get(event["phase"], 0.0) + end - event["time"]
    return found


def _config(run_dir: Path) -> TrainConfig | None:
    try:
        return load_config(TrainConfig, run_dir / CONFIG_FILE)
    except ConfigError:
        return None


def _checkpoints(run: RunDir) -> Iterator[CheckpointMeta]:
    for path in list_checkpoints(run.checkpoints):
        with suppress(CheckpointError):  # pruned meanwhile by a run that goes on
            yield read_meta(path)


def _state(run: RunDir, events: Sequence[dict[str, Any]]) -> str:
    if run.failure.is_file():
        arguments: list[str] = json.loads(run.failure.read_text())["arguments"]
        return f"failed: {': '.join(arguments[:2])}"
    phase = events[-1]["phase"] if events else "not started"
    if phase == "stopped":
        return f"stopped: {events[-1].get('reason', '')}"
    return phase if phase in LAST_PHASES else f"not finished; its last phase: {phase}"


def _data(run_dir: Path) -> dict[str, dict[str, Any]]:
    files = {"data.train": run_dir / "data.json", "data.eval": run_dir / "data-eval.json"}
    return {name: json.loads(path.read_text()) for name, path in files.items() if path.is_file()}
