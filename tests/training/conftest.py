"""What tests of trackers share."""

import os
from pathlib import Path

import pytest

from raylm.training.sinks import follow


@pytest.fixture
def own_trackers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Trackers that take no settings of the user's, and answer soon."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    # What the sinks themselves set by default, so that it goes away with the test.
    for name in ("WANDB_ERROR_REPORTING", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setattr(follow, "POLL_S", 0.02)
    monkeypatch.setattr(follow, "CLOSING_S", 300.0)  # waits as long as a loaded machine needs
