"""What a sweep knows after its driver was killed, and which report is the best."""

import json
import math
import resource
from pathlib import Path
from typing import Any

import pytest

from raylm.errors import RunDirError
from raylm.tuning.journal import JOURNAL_FILE, Journal, SweepState, read_journal


def write_reports(journal: Journal, number: int, values: list[float], *, settings: Any = None) -> None:
    journal.write("trial", number=number, settings=settings or {"optimizer.learning_rate": 10.0**-number})
    journal.write("start", number=number, num_steps=len(values))
    for step, value in enumerate(values, start=1):
        journal.write("report", number=number, step=step, value=value, tokens=10 * step, seconds=1.0 * step, figures={})


def test_the_best_is_the_best_report_ever(tmp_path: Path) -> None:
    """T02: trial 0 reports 1.0, 0.2, 0.9 and trial 1 0.5 throughout: trial 0 at step 2 is the best."""
    journal = Journal(tmp_path)
    write_reports(journal, 0, [1.0, 0.2, 0.9])
    write_reports(journal, 1, [0.5, 0.5, 0.5])
    write_reports(journal, 2, [math.nan, math.nan])
    best, worst = journal.state.best("min"), journal.state.best("max")
    assert best is not None
    assert worst is not None
    assert (best[0].number, best[1].step, best[1].value) == (0, 2, 0.2)
    assert (worst[0].number, worst[1].step) == (0, 1)
    journal.close()
    read = read_journal(tmp_path).best("min")
    assert read is not None
    assert (read[0].number, read[1]) == (0, best[1])


def test_only_numbers_can_be_best(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    write_reports(journal, 0, [math.nan, math.inf])
    assert journal.state.best("min") is None
    assert SweepState().best("min") is None


def test_what_ran_when_the_driver_died_is_unfinished(tmp_path: Path) -> None:
    """T01, T05: ended trials are known as such; the one that ran goes on; a half line is left out and written over."""
    journal = Journal(tmp_path)
    journal.write("session", folder="/first")
    write_reports(journal, 0, [1.0])
    journal.write("end", number=0, state="finished")
    journal.write("session", folder="/second")
    write_reports(journal, 1, [1.0])
    journal.write("end", number=1, state="failed", reason="out of memory")
    write_reports(journal, 2, [1.0, 0.5])
    journal.close()
    with (tmp_path / JOURNAL_FILE).open("a") as file:
        file.write('{"event": "end", "number": 2, "sta')
    again = Journal(tmp_path)
    assert again.state.folder == "/first"
    states = {number: (trial.state, trial.has_ended, trial.reason) for number, trial in again.state.trials.items()}
    assert states == {
        0: ("finished", True, ""),
        1: ("failed", True, "out of memory"),
        2: ("unfinished", False, ""),
    }
    assert again.state.trials[2].last is not None
    assert again.state.trials[2].last.step == 2
    again.write("end", number=2, state="stopped")
    again.close()
    lines = (tmp_path / JOURNAL_FILE).read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines][-2:] == ["report", "end"]
    assert read_journal(tmp_path).trials[2].state == "stopped"


def test_damage_in_the_middle_is_told(tmp_path: Path) -> None:
    (tmp_path / JOURNAL_FILE).write_text(
        '{"event": "session", "time": 1.0}\n{"eve\n{"event": "session", "time": 2.0}\n'
    )
    with pytest.raises(RunDirError, match=r"journal\.jsonl:2: is damaged"):
        read_journal(tmp_path)


@pytest.mark.parametrize("line", ['{"event": "end", "number": 3, "state": "finished"}', '{"time": 1.0}', "3"])
def test_lines_that_say_nothing_are_damage_too(tmp_path: Path, line: str) -> None:
    (tmp_path / JOURNAL_FILE).write_text(line + "\n")
    with pytest.raises(RunDirError, match=r"journal\.jsonl:1: is damaged"):
        Journal(tmp_path)


def test_a_last_line_without_its_end_is_none_though_it_can_be_read(tmp_path: Path) -> None:
    """It is cut off, so what it says must not be known either: later lines would be about nothing."""
    journal = Journal(tmp_path)
    write_reports(journal, 0, [1.0])
    journal.close()
    path = tmp_path / JOURNAL_FILE
    path.write_text(path.read_text() + '{"event": "trial", "number": 1, "settings": {}}')
    assert list(read_journal(tmp_path).trials) == [0]
    again = Journal(tmp_path)
    assert list(again.state.trials) == [0]
    again.write("end", number=0, state="finished")
    again.close()
    assert read_journal(tmp_path).trials[0].state == "finished"


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path: Path) -> None:
    """The system writes what there is room for, here up to a limit of the file's size."""
    journal = Journal(tmp_path)
    write_reports(journal, 0, [1.0])
    path = tmp_path / JOURNAL_FILE
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (10, 0):
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room, limits[1]))
        try:
            with pytest.raises(RunDirError, match=r"journal\.jsonl: cannot be written: .*Make room, then --resume"):
                journal.write("end", number=0, state="finished")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == before
        assert journal.state.trials[0].state == "running"
    journal.write("end", number=0, state="finished")
    journal.close()
    assert read_journal(tmp_path).trials[0].state == "finished"


def test_wall_time_is_that_of_the_sessions(tmp_path: Path) -> None:
    lines = [("session", 0.0), ("session", 100.0), ("session", 1000.0)]
    trial = [{"event": "trial", "time": 130.0, "number": 0, "settings": {}}]
    events: list[dict[str, Any]] = [{"event": name, "time": at} for name, at in lines]
    text = [events[0], {"event": "trial", "time": 30.0, "number": 1, "settings": {}}, events[1], *trial, events[2]]
    (tmp_path / JOURNAL_FILE).write_text("".join(json.dumps(line) + "\n" for line in text))
    assert read_journal(tmp_path).seconds == 60.0


def test_settings_of_a_copied_trial_change_from_there_on(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    write_reports(journal, 0, [1.0], settings={"a": 1})
    journal.write("copy", number=0, source=3, step=7, settings={"a": 2})
    journal.write("report", number=0, step=8, value=0.5, tokens=80, seconds=8.0, figures={})
    trial = journal.state.trials[0]
    assert [report.settings for report in trial.reports] == [{"a": 1}, {"a": 2}]
    assert trial.copied_from == [(3, 7)]
    assert trial.tokens == 80


def test_tokens_of_steps_that_a_copy_took_again_count_again(tmp_path: Path) -> None:
    """10 tokens a step. Steps 1 to 3, back to 1, 2 and 3 again: 5 steps."""
    journal = Journal(tmp_path)
    write_reports(journal, 0, [3.0, 2.0, 1.0])
    trial = journal.state.trials[0]
    assert (trial.tokens, trial.step) == (30, 3)
    journal.write("copy", number=0, source=1, step=1, settings={})
    assert (trial.tokens, trial.step) == (30, 1)
    for step in (2, 3):
        journal.write("report", number=0, step=step, value=1.0, tokens=10 * step, seconds=1.0, figures={})
    assert (trial.tokens, trial.step) == (50, 3)
