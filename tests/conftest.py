"""What tests share: a tiny model the project makes itself, datasets, and one Ray for the session."""

import atexit
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from tests.tiny import build_tiny_model, build_tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "RAYLM_DATA_CACHE" not in os.environ:  # never the user's own
    os.environ["RAYLM_DATA_CACHE"] = tempfile.mkdtemp(prefix="raylm-test-cache-")
    atexit.register(shutil.rmtree, os.environ["RAYLM_DATA_CACHE"], ignore_errors=True)
# Known to Ray's workers too, which start with this environment, and never the user's own.
os.environ |= {"AWS_ACCESS_KEY_ID": "raylm-test", "AWS_SECRET_ACCESS_KEY": "raylm-test-secret"}
os.environ |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-docs", action="store_true", help="write tables that slow tests measure into docs/")
    parser.addoption("--optimizers", help="rows of the matrix of optimizers, with commas between; all by default")


@pytest.fixture(autouse=True)
def root_log_level() -> Iterator[None]:
    """vLLM raises it when its server's modules are imported, and tests after that would see no log."""
    level = logging.root.level
    yield
    logging.root.setLevel(level)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny-llama")


def command_line(process: Any) -> str:
    """The command line of a psutil process; empty for one that has ended meanwhile."""
    import psutil

    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


WriteDataset = Callable[..., Path]


@pytest.fixture
def write_dataset(tmp_path: Path) -> WriteDataset:
    """Writes instances, or (question, answer) pairs, as an LMFlow conversation file."""

    def write(rows: list[Any], name: str = "data.json") -> Path:
        instances = [
            row
            if isinstance(row, dict)
            else {"messages": [{"role": "user", "content": row[0]}, {"role": "assistant", "content": row[1]}]}
            for row in rows
        ]
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"type": "conversation", "instances": instances}), encoding="utf-8")
        return path

    return write


PAIRS = [(f"question {number} " + "why " * (number % 7), "yes " * (1 + number % 5)) for number in range(40)]


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """One local Ray for all tests of the session, with more logical CPUs than the machine has."""
    from raylm.ray_session import ray_session

    with ray_session(None, num_cpus=6) as ray:
        yield ray


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of moto's S3 server on loopback."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty bucket `data`, found as a user's is: by AWS_ENDPOINT_URL and credentials in the environment."""
    import boto3

    urlopen(Request(f"{s3_server}/moto-api/reset", method="POST"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    found = boto3.resource("s3", endpoint_url=s3_server).Bucket("data")
    found.create()
    return found
