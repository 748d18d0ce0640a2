"""What a sweep has done, one JSON object a line: trials with their settings, reports, ends.

The journal is all that a resumed sweep knows: searcher and scheduler are made anew from it. A line is written before
anything follows from it, so whatever the driver dies of, a trial that has ended is never run again and no number is
given twice.
"""

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raylm.errors import RunDirError
from raylm.tuning.space import Settings

JOURNAL_FILE = "journal.jsonl"
ENDED = ("finished", "stopped", "failed")
"""States of trials that do not run again. `stopped`: by the scheduler."""


@dataclass(frozen=True, slots=True)
class Report:
    """A trial's figures at a step where its metric is known. settings: those it was trained with by then; step_tokens:
    of a step on average, 0 where that was not noted."""

    step: int
    value: float
    tokens: int
    seconds: float
    figures: Mapping[str, float]
    settings: Mapping[str, Any]
    step_tokens: float = 0.0


@dataclass(slots=True)
class Trial:
    """One trial. state: one of ENDED, else `running` or `unfinished`; reason: why it failed, or ended early;
    num_steps: planned; lacking: sinks that did not get all of its figures, and what each said."""

    number: int
    settings: Settings
    state: str = "unfinished"
    reason: str = ""
    reports: list[Report] = field(default_factory=list)
    num_steps: int | None = None
    lacking: dict[str, str] = field(default_factory=dict)
    copied_from: list[tuple[int, int]] = field(default_factory=list)
    """(trial, step) whose checkpoints it went on from, of population based training."""
    copied_after: list[int] = field(default_factory=list)
    """How many reports it had made before each copy."""

    @property
    def has_ended(self) -> bool:
        """Whether it never runs again."""
        return self.state in ENDED

    @property
    def last(self) -> Report | None:
        """The newest report."""
        return self.reports[-1] if self.reports else None

    @property
    def step(self) -> int:
        """The step it goes on from: of the last report, or of the copy after it."""
        if self.copied_after and self.copied_after[-1] == len(self.reports):
            return self.copied_from[-1][1]
        return self.reports[-1].step if self.reports else 0

    @property
    def tokens(self) -> int:
        """Tokens it was trained on, those of steps it took again after a copy included. Reports count from the run's
        first step: after a copy, what the trial itself had trained up to the copied step was there already."""
        copies = {after: step for after, (_, step) in zip(self.copied_after, self.copied_from, strict=True)}
        total, former = 0, 0
        for place, report in enumerate(self.reports):
            if place in copies:
                before = (one.tokens for one in reversed(self.reports[:place]) if one.step <= copies[place])
                former = next(before, 0)
            total += report.tokens - (former if former <= report.tokens else 0)
            former = report.tokens
        return total

    def best(self, mode: str) -> Report | None:
        """The best report ever, the earliest of equals; values that are no numbers never count."""
        known = [report for report in self.reports if math.isfinite(report.value)]
        if not known:
            return None
        return (min if mode == "min" else max)(known, key=lambda report: report.value)


@dataclass(slots=True)
class SweepState:
    """All of a sweep. seconds: wall time of its sessions so far; folder: where it began, which relative paths of its
    configuration are read from."""

    trials: dict[int, Trial] = field(default_factory=dict)
    seconds: float = 0.0
    folder: str = ""

    @property
    def tokens(self) -> int:
        """Tokens of all trials."""
        return sum(trial.tokens for trial in self.trials.values())

    def best(self, mode: str) -> tuple[Trial, Report] | None:
        """The trial with the best report ever, and the report; the lowest number of equals."""
        found = [(trial, report) for trial in self.trials.values() if (report := trial.best(mode)) is not None]
        if not found:
            return None
        sign = 1 if mode == "min" else -1
        return min(found, key=lambda pair: (sign * pair[1].value, pair[0].number))


class Journal:
    """Appends to a sweep's journal, and keeps the state it says."""

    def __init__(self, sweep_dir: Path) -> None:
        self._path = sweep_dir / JOURNAL_FILE
        _drop_half_line(self._path)
        self.state = read_journal(sweep_dir)
        self.problem: RunDirError | None = None
        """Why the last event could not be written, if so."""
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, event: str, **details: Any) -> None:
        """One event, on its way to the disk when this returns. Raises RunDirError when there is no room for it."""
        line = {"event": event, "time": round(time.time(), 3), **details}
        content = (json.dumps(line) + "\n").encode()
        size = os.fstat(self._file).st_size
        try:
            written, problem = os.write(self._file, content), "no space"
        except OSError as error:
            written, problem = 0, error.strerror or str(error)
        if written < len(content):
            os.ftruncate(self._file, size)
            self.problem = RunDirError(str(self._path), f"cannot be written: {problem}.", "Make room, then --resume.")
            raise self.problem
        _apply(self.state, line)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)


def read_journal(sweep_dir: Path) -> SweepState:
    """The state of a sweep, going on or not. A last line that was cut off is left out; trials that were running are
    unfinished."""
    state = SweepState()
    session: tuple[float, float] | None = None
    path = sweep_dir / JOURNAL_FILE
    for number, text in enumerate(_lines(path), start=1):
        try:
            line = json.loads(text)
            if line["event"] == "session":
                state.seconds += session[1] - session[0] if session else 0.0
                session = (line["time"], line["time"])
                for trial in state.trials.values():
                    trial.state = "unfinished" if trial.state == "running" else trial.state
            elif session:
                session = (session[0], line["time"])
            _apply(state, line)
        except (ValueError, KeyError, TypeError):
            raise RunDirError(f"{path}:{number}", "is damaged.", "Begin a new sweep in another folder.") from None
    state.seconds += session[1] - session[0] if session else 0.0
    for trial in state.trials.values():
        trial.state = "unfinished" if trial.state == "running" else trial.state
    return state


def _lines(path: Path) -> list[str]:
    """The whole ones: what has no end yet is still being written, or was cut off."""
    return path.read_text().split("\n")[:-1] if path.is_file() else []


def _drop_half_line(path: Path) -> None:
    """What a killed driver left of its last line, which the next one would be glued to."""
    if path.is_file() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def _apply(state: SweepState, line: Mapping[str, Any]) -> None:
    event = line["event"]
    if event == "session":
        state.folder = state.folder or line.get("folder", "")
        return
    if event == "trial":
        state.trials[line["number"]] = Trial(line["number"], dict(line["settings"]))
        return
    if event not in ("start", "report", "end", "copy", "lacking"):
        return
    trial = state.trials[line["number"]]
    if event == "start":
        trial.state, trial.reason, trial.num_steps, trial.lacking = "running", "", line.get("num_steps"), {}
    elif event == "report":
        value = line["value"]
        report = Report(
            line["step"],
            math.nan if value is None else value,
            line["tokens"],
            line["seconds"],
            line["figures"],
            dict(trial.settings),
            line.get("step_tokens", 0.0),
        )
        trial.reports.append(report)
        trial.num_steps = line.get("num_steps", trial.num_steps)
    elif event == "lacking":
        trial.lacking = dict(line["sinks"])
    elif event == "copy":
        trial.settings = dict(line["settings"])
        trial.copied_from.append((line["source"], line["step"]))
        trial.copied_after.append(len(trial.reports))
    else:
        trial.state, trial.reason = line["state"], line.get("reason", "")
