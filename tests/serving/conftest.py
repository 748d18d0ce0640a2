"""The model that the endpoint tests serve, adapters for it, and the one server that their modules share."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.serving.adapter_support import build_adapter
from tests.serving.door_support import KEYS
from tests.serving.servers import ENGINE, Running, running_server
from tests.tiny import build_tiny_model


@pytest.fixture(scope="session")
def served_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with heads of 32: vLLM's CPU attention takes no smaller ones."""
    return build_tiny_model(tmp_path_factory.mktemp("served") / "tiny-llama", hidden_size=128)


@pytest.fixture(scope="session")
def two_versions(served_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two versions of one adapter, of ranks 4 and 12."""
    folder = tmp_path_factory.mktemp("versions")
    build_adapter(folder / "v1", served_model_dir, seed=1)
    build_adapter(folder / "v2", served_model_dir, seed=2, r=12)
    return folder


@pytest.fixture
def adapter_root(two_versions: Path, tmp_path: Path) -> Path:
    """A root with the adapters `one` and `two`."""
    shutil.copytree(two_versions / "v1", tmp_path / "root" / "one")
    shutil.copytree(two_versions / "v2", tmp_path / "root" / "two")
    return tmp_path / "root"


class SharedServer:
    """Starts the server when it is first asked for, and again for whoever comes after the test that stops it."""

    def __init__(self, stack: ExitStack, model: Path, folders: pytest.TempPathFactory) -> None:
        self._stack, self._model, self._folders = stack, model, folders
        self._running: Running | None = None

    def get(self) -> Running:
        if self._running is None or self._running.process.poll() is not None:
            engine = [f"engine.{key}={json.dumps(value)}" for key, value in ENGINE.items()]
            folder = self._folders.mktemp("server")
            (folder / "keys.yaml").write_text(KEYS)
            settings = ["dtype=float32", f"api_key_file={folder / 'keys.yaml'}", *engine]
            server = running_server(self._model, folder, settings)
            self._running = self._stack.enter_context(server)
        return self._running


@pytest.fixture(scope="session")
def shared_server(served_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedServer]:
    with ExitStack() as stack:
        yield SharedServer(stack, served_model_dir, tmp_path_factory)


@pytest.fixture
def server(shared_server: SharedServer) -> Running:
    """Our server behind HAProxy, shared by the modules. test_endpoint.py stops it at its end: to share one server, the
    names of other modules that use it come before that in the alphabet."""
    return shared_server.get()
