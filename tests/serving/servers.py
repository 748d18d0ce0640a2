"""What the endpoint's tests share: a server in a process of its own, started and asked as users do."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

MODEL = "tiny-llama"
KEY = "s3cret-" + "k" * 24
# Arguments of vLLM's that the shared server has, in the form of our `engine` option.
ENGINE: dict[str, Any] = {
    "trust_request_chat_template": True,
    "enable_auto_tool_choice": True,
    "tool_call_parser": "hermes",
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}
PROGRAM = """
import sys
from raylm.config import ServeConfig, load_config
from raylm.serving import serve

with serve(load_config(ServeConfig, {}, sys.argv[1:])) as server:
    print(server.proxy, server.url, flush=True)
    server.wait()
"""


@dataclass
class Running:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    url: str
    proxy: str
    ray_dir: Path
    log: Path

    def get(self, path: str, method: str = "GET", key: str | None = KEY, **options: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        headers |= options.pop("headers", {})
        return httpx.request(method, self.url + path, headers=headers, timeout=60, trust_env=False, **options)

    def client(self, key: str = KEY) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def metrics(self) -> dict[str, float]:
        """Sample with its labels -> value, of one /metrics."""
        return read_metrics(self.get("/metrics").text)


def read_metrics(text: str) -> dict[str, float]:
    """Prometheus text -> {name: sum over labels}; histograms give name_count, name_sum."""
    from prometheus_client.parser import text_string_to_metric_families

    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return totals


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def program_process(
    program: str, options: Sequence[str], log_file: Path, *, variables: Mapping[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[str], list[str], Path]]:
    """A Python program that prints a line when it serves, with a Ray of its own, stopped by ctrl-c.

    options: its arguments; variables: of its environment. Yields the process, the words of the line and Ray's folder.
    """
    # Ray's sockets need a short path.
    with tempfile.TemporaryDirectory(prefix="rl") as ray_dir, log_file.open("w") as log:
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"RAY_TMPDIR": ray_dir}
        command = [sys.executable, "-c", program, *options]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment | dict(variables or {})
        )
        try:
            assert process.stdout is not None
            words = process.stdout.readline().split()
            assert words, log_file.read_text()
            yield process, words, Path(ray_dir)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait(timeout=60)


@contextmanager
def server_process(
    options: Sequence[str], log_file: Path, *, variables: Mapping[str, str] | None = None
) -> Iterator[Running]:
    """Our server with these settings, KEY=VALUE, in a process of its own."""
    with program_process(PROGRAM, options, log_file, variables=variables) as (process, (proxy, url), ray_dir):
        yield Running(process, url=url, proxy=proxy, ray_dir=ray_dir, log=log_file)


@contextmanager
def running_server(
    model: Path,
    folder: Path,
    settings: Sequence[str] = (),
    *,
    port: int | None = None,
    variables: Mapping[str, str] | None = None,
) -> Iterator[Running]:
    """Our server behind HAProxy, stopped by ctrl-c. settings: KEY=VALUE, after those of every test server; variables
    of its environment."""
    (folder / "key").write_text(KEY + "\n")
    options = [
        f"model={model}",
        f"name={MODEL}",
        f"port={port or free_port()}",
        f"api_key_file={folder / 'key'}",
        "proxy=haproxy",
        "kv_cache_gib=0.1",
        *settings,
    ]
    with server_process(options, folder / "log", variables=variables) as server:
        yield server


@contextmanager
def bare_server(arguments: Sequence[str], environment: dict[str, str], log_file: Path) -> Iterator[str]:
    """vLLM's own server with these arguments; yields its address. Raises AssertionError with its log when it ends."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments]
    with log_file.open("w") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"],
            stdout=log,
            stderr=log,
            env=os.environ | environment,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            while process.poll() is None and not _answers(url):
                time.sleep(0.25)
            assert process.poll() is None, log_file.read_text()
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
