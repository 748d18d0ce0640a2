import json
import logging
from pathlib import Path

import pytest

from raylm.training.metrics import MetricsWriter, plot_losses, read_metrics
from raylm.training.progress import watch_run
from tests.terminal import Terminal, check_log_stands_above

STEP = {
    "train/loss": 1.5,
    "train/grad_norm": 0.5,
    "train/learning_rate": 1e-4,
    "train/tokens_per_second": 100.0,
    "train/mfu": 0.4,
    "train/step_s": 2.0,
    "memory/host_gib": 1.0,
}


def test_phases_and_steps_are_shown_as_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "raylm.training.progress")
    (tmp_path / "events.jsonl").write_text(json.dumps({"phase": "an older run"}) + "\n")
    with (tmp_path / "out.txt").open("w") as stream, watch_run(tmp_path, stream):
        with (tmp_path / "events.jsonl").open("a") as file:
            file.write(json.dumps({"phase": "training", "step": 0, "num_steps": 4}) + "\n")
        with (tmp_path / "metrics.jsonl").open("w") as file:
            file.write(json.dumps({"step": 4, **STEP}) + "\n" + '{"step": 5, "tra')
    assert caplog.messages[0] == "training"
    assert caplog.messages[1].startswith("step 4/4  loss 1.5000")
    assert caplog.messages[1].endswith("0 s left")
    assert len(caplog.messages) == 2


def test_a_resumed_run_shows_its_own_steps_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its file of figures is written anew, with the lines of former starts."""
    caplog.set_level(logging.INFO, "raylm.training.progress")
    with (tmp_path / "out.txt").open("w") as stream, watch_run(tmp_path, stream):
        event = {"phase": "training", "step": 4, "num_steps": 6, "workers": 1}
        (tmp_path / "events.jsonl").write_text(json.dumps(event) + "\n")
        lines = [{**STEP, "step": step} for step in (1, 4, 6)]
        del lines[-1]["train/grad_norm"]  # an fp16 step that was passed over
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [message.split("  ")[0] for message in caplog.messages] == ["training (step 4)", "step 6/6"]


def test_what_is_logged_stands_above_the_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not behind it, where the next drawing would leave half a bar."""
    terminal = Terminal()
    check_log_stands_above(watch_run(tmp_path, terminal), terminal, "starting", monkeypatch)


def test_a_resumed_run_writes_each_step_once(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, start_step=0)
    for step in (1, 2, 3):
        writer.write(step, {"train/loss": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "tra')  # killed in the middle of a line
    writer = MetricsWriter(tmp_path, start_step=2)
    writer.write(3, {"train/loss": 30.0})
    writer.close()
    assert [(line["step"], line["train/loss"]) for line in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    plot_losses(tmp_path, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
