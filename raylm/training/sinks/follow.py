"""Sends the figures of a run to its sinks while it goes on.

The sinks read metrics.jsonl on the driver, each in a thread of its own. So credentials stay with the process that the
user started, no tracker can hold up a step, what could not be sent waits in the file, and a worker that starts again
sends nothing twice. The price: trackers' own measurements of the machine are those of the driver's.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raylm.config import TrainConfig
from raylm.errors import RunDirError, TrackingError
from raylm.training.metrics import METRICS_FILE, Tail, read_events
from raylm.training.run_dir import RunDir
from raylm.training.sinks.base import Figures, RunInfo, Sink
from raylm.training.sinks.secrets import without_secrets
from raylm.training.sinks.table import check_sinks, sink_class
from raylm.training.stopping import STOP_FILE

logger = logging.getLogger(__name__)

FOLDER = "tracking"
POLL_S = 1.0
LONGEST_PAUSE_S = 60.0
"""Between attempts to reach a sink that takes no figures."""
CLOSING_S = 60.0
"""A run waits so long at its end for a sink to take what is left."""
_LONGEST_MESSAGE = 300


class Following:
    """What became of the sinks. failure: why the run was asked to stop, with `metrics.on_sink_failure=stop`;
    lacking: sinks that did not get everything, and what each said first."""

    def __init__(self) -> None:
        self.failure: str | None = None
        self.lacking: dict[str, str] = {}


def send_run(config: TrainConfig, run_dir: Path) -> None:
    """Sends what the sinks of the configuration lack of a run that has ended.

    Raises RunDirError for a folder that holds no figures, ConfigError, and TrackingError when a sink takes them not.
    """
    if not (run_dir / METRICS_FILE).is_file():
        raise RunDirError(str(run_dir), "holds no run that took a step.")
    check_sinks(config.metrics)
    phase = read_events(run_dir)[-1:]
    status = {"done": "finished", "stopped": "stopped"}.get(phase[0]["phase"] if phase else "", "failed")
    with send_figures(config, run_dir, status=status) as following:
        pass
    for name, problem in following.lacking.items():
        raise TrackingError(f"metrics.sinks: {name}", f"takes no figures: {problem}.")


@contextmanager
def send_figures(config: TrainConfig, run_dir: Path, *, status: str | None = None) -> Iterator[Following]:
    """While the block runs, sends each line of metrics.jsonl to the sinks of the configuration, and what is left at
    its end. Raises nothing of its own: a sink that takes no figures is warned about once.

    status: of a run that is over; a sink that has not heard of its end yet is told.
    """
    following = Following()
    info = RunInfo(run_dir, config)
    threads = [_Follower(name, sink_class(name)(info), info, following, status) for name in config.metrics.sinks]
    for thread in threads:
        thread.start()
    ended = "failed"
    try:
        yield following
        ended = "stopped" if RunDir(run_dir).stopped.is_file() else "finished"
    finally:
        for thread in threads:
            thread.end(status or ended)
        deadline = time.monotonic() + CLOSING_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                following.lacking.setdefault(thread.sink_name, thread.problem or f"no answer in {CLOSING_S:.0f} s")
        for name in following.lacking:
            logger.warning("metrics.sinks: %s lacks figures; `raylm track %s` sends them", name, run_dir)


class _Follower(threading.Thread):
    """Sends to one sink. What was sent stands in `run.dir`/tracking, so that going on with a run repeats nothing."""

    def __init__(self, name: str, sink: Sink, info: RunInfo, following: Following, status: str | None) -> None:
        super().__init__(name=f"raylm-{name}", daemon=True)
        self.sink_name = name
        self._sink, self._info, self._following = sink, info, following
        self._tail = Tail(info.dir / METRICS_FILE, from_start=True)
        self._pending: list[dict[str, Any]] = []
        self._record = _Record(info.dir / FOLDER / f"{name}.json", sink.place)
        self._is_open = False
        self.problem = ""
        self._ended = threading.Event()
        self._status, self._must_close = "", status is not None
        self._deadline = 0.0

    def end(self, status: str) -> None:
        """Sends what is left and closes the sink, in the thread."""
        self._status, self._deadline = status, time.monotonic() + CLOSING_S / 2
        self._ended.set()

    def run(self) -> None:
        """Follows the file until the run has ended and all is sent, or the time for that is over."""
        pause = POLL_S
        while True:
            ending = self._ended.wait(pause)
            self._pending += self._tail.read()
            pause = POLL_S if self._send() else min(2 * pause, LONGEST_PAUSE_S)
            if ending and (not self._pending or time.monotonic() > self._deadline):
                break
            if ending:
                time.sleep(POLL_S)
        late = self._must_close and self._record.is_unclosed
        done = not self._pending and (not (self._is_open or late) or self._attempt(self._close))
        if not done:
            self._following.lacking[self.sink_name] = self.problem

    def _send(self) -> bool:
        if not self._record.unsent(self._pending) or self._attempt(self._take):
            self._pending = []
            return True
        return False

    def _take(self) -> None:
        self._open()
        lines = self._record.unsent(self._pending)
        with self._record.sending(lines):
            self._sink.write(lines)

    def _open(self) -> None:
        if not self._is_open:
            self._record.opened(self._sink.open(self._record.run_id))
            self._is_open = True

    def _close(self) -> None:
        self._open()
        self._sink.close(self._status)
        self._record.closed()

    def _attempt(self, action: Callable[[], None]) -> bool:
        try:
            action()
        except Exception as error:
            # Whatever a tracker's client raises: going on without it is the point.
            self._failed(without_secrets(f"{type(error).__name__}: {error}").splitlines()[0][:_LONGEST_MESSAGE])
            return False
        return True

    def _failed(self, text: str) -> None:
        if self.problem:
            return
        self.problem = text
        if self._info.section.on_sink_failure == "stop":
            self._following.failure = f"{self.sink_name} takes no figures (metrics.on_sink_failure=stop)"
            (self._info.dir / STOP_FILE).touch()
            logger.warning("metrics.sinks: %s takes no figures: %s. The run stops", self.sink_name, text)
        else:
            logger.warning(
                "metrics.sinks: %s takes no figures: %s. Training goes on; they are sent once it takes them",
                self.sink_name,
                text,
            )


class _Record:
    """The id of a run in a sink, and for each figure the last step that was sent."""

    def __init__(self, path: Path, place: str) -> None:
        self._path, self._place = path, place
        self.run_id: str | None = None
        self.is_unclosed = False
        self._sent: dict[str, int] = {}
        try:
            former = json.loads(path.read_text())
        except (OSError, ValueError):
            return
        if former["place"] == place:
            self.run_id, self._sent, self.is_unclosed = former["run_id"], former["sent"], not former["closed"]

    def unsent(self, lines: Sequence[dict[str, Any]]) -> list[Figures]:
        """What of lines of metrics.jsonl was not sent yet; each figure of a step once, though it stand there again."""
        newest, found = dict(self._sent), []
        for line in lines:
            values = {
                name: value
                for name, value in line.items()
                if name not in ("step", "time") and line["step"] > newest.get(name, -1)
            }
            newest.update(dict.fromkeys(values, line["step"]))
            if values:
                found.append(Figures(line["step"], line.get("time", time.time()), values))
        return found

    def opened(self, run_id: str) -> None:
        """A run of another id begins anew."""
        if run_id != self.run_id:
            self.run_id, self._sent = run_id, {}
        self.is_unclosed = True
        self._write()

    def closed(self) -> None:
        """The sink has been told how the run ended."""
        self.is_unclosed = False
        self._write()

    @contextmanager
    def sending(self, lines: Sequence[Figures]) -> Iterator[None]:
        """Written down first: a driver killed in between leaves a gap there rather than steps that stand twice."""
        former = self._sent
        self._sent = former | {name: line.step for line in lines for name in line.values}
        try:
            self._write()
            yield
        except BaseException:
            self._sent = former
            self._write()
            raise

    def _write(self) -> None:
        self._path.parent.mkdir(exist_ok=True)
        partial = self._path.with_suffix(f".{os.getpid()}")
        tree = {"place": self._place, "run_id": self.run_id, "closed": not self.is_unclosed, "sent": self._sent}
        partial.write_text(json.dumps(tree))
        partial.rename(self._path)
