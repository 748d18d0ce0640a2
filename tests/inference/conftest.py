"""The model that generation tests ask."""

from pathlib import Path

import pytest

from tests.tiny import build_tiny_model


@pytest.fixture(scope="session")
def asked_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with heads of 32: vLLM's CPU attention takes no smaller ones."""
    return build_tiny_model(tmp_path_factory.mktemp("asked") / "tiny-llama", hidden_size=128)
