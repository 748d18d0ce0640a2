"""The model that the endpoint tests serve."""

from pathlib import Path

import pytest

from tests.tiny import build_tiny_model


@pytest.fixture(scope="session")
def served_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with heads of 32: vLLM's CPU attention takes no smaller ones."""
    return build_tiny_model(tmp_path_factory.mktemp("served") / "tiny-llama", hidden_size=128)
