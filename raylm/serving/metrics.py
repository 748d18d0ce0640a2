"""One /metrics for a replica: vLLM's figures, the replica's own, and Ray Serve's.

vLLM's page comes out of its own registry; Serve's figures are on the page of the node's metrics agent, which is asked
when ours is read. Behind a proxy with several replicas any of them answers, so each sample says whose it is: a label
`replica`, which Serve's figures have already.
"""

import asyncio
import logging
import re
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

PATH = "/metrics"
SERVE_PREFIX = "ray_serve_"
_AGENT_TIMEOUT_S = 2.0
_SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(\{)?", re.M)


class Phases:
    """Seconds of each part of a replica's start, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Around the part; it counts when it ends without an error."""
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started


class OneMetricsPage:
    """ASGI middleware that adds to what the application answers at /metrics. Everything else passes untouched.

    own: gives text in Prometheus' format, without label `replica`. serve_metrics: gives Serve's page, and may block.
    """

    def __init__(self, app: App, replica: str, own: Callable[[], str], serve_metrics: Callable[[], str]) -> None:
        self._app, self._replica, self._own, self._serve_metrics = app, replica, own, serve_metrics

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if not _reads_metrics(scope):
            await self._app(scope, receive, send)
            return
        messages: list[Message] = []

        async def keep(message: Message) -> None:
            messages.append(message)

        await self._app(scope, receive, keep)
        start, body = messages[0], b"".join(message.get("body", b"") for message in messages[1:])
        if start["status"] == 200:
            serves = await asyncio.to_thread(self._serve_metrics)
            text = labelled(body.decode() + self._own(), "replica", self._replica)
            body = (text + serves).encode()
            headers = [(name, value) for name, value in start["headers"] if name.lower() != b"content-length"]
            start = {**start, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
        await send(start)
        await send({"type": "http.response.body", "body": body})


def _reads_metrics(scope: Message) -> bool:
    """A preflight of the same path, which passes without a key, must not get the figures."""
    if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
        return False
    return str(scope["path"]).removeprefix(scope.get("root_path", "")).rstrip("/") == PATH


def labelled(text: str, name: str, value: str) -> str:
    """A page of samples, each with one more label."""
    label = f'{name}="{value}"'
    return _SAMPLE.sub(lambda found: f"{found[1]}{{{label}{',' if found[2] else '}'}", text)


def own_metrics(model: str, folder: str, seconds: Mapping[str, float]) -> str:
    """What only the replica knows: versions, the model, and how long each part of the start took."""
    from importlib.metadata import version

    from prometheus_client import CollectorRegistry, Gauge, generate_latest
    from vllm import __version__ as vllm_version

    registry = CollectorRegistry()
    versions = {name: version(name) for name in ("raylm", "ray", "torch")} | {"vllm": vllm_version}
    built = Gauge("raylm_build_info", "Versions of the software; always 1.", list(versions), registry=registry)
    built.labels(**versions).set(1)
    served = Gauge("raylm_model_info", "The model that is served; always 1.", ["model_name", "path"], registry=registry)
    served.labels(model_name=model, path=folder).set(1)
    start = Gauge("raylm_startup_seconds", "Seconds of a part of the start.", ["phase"], registry=registry)
    for phase, duration in seconds.items():
        start.labels(phase=phase).set(duration)
    return generate_latest(registry).decode()


def replica_id() -> str:
    """Serve's id of this replica, as in its own figures; empty outside of one."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        return serve.get_replica_context().replica_id.unique_id
    except RayServeException:
        return ""


class ServePage:
    """Ray Serve's figures, from the metrics agent of this node; empty, with one warning, where there is none."""

    def __init__(self) -> None:
        self._url: str | None = None
        self._warned = False

    def __call__(self) -> str:
        """Blocks for two seconds at most."""
        try:
            self._url = self._url or _agent_url()
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(self._url, timeout=_AGENT_TIMEOUT_S) as response:
                return serve_lines(response.read().decode())
        except (OSError, LookupError) as error:
            if not self._warned:
                logger.warning(
                    "/metrics lacks Ray Serve's figures: the node's metrics agent does not answer: %s", error
                )
            self._warned = True
            return ""


def serve_lines(page: str) -> str:
    """The samples of a page that are Serve's, with their descriptions."""
    lines = page.splitlines(keepends=True)
    return "".join(
        line for line in lines if line.removeprefix("# HELP ").removeprefix("# TYPE ").startswith(SERVE_PREFIX)
    )


def _agent_url() -> str:
    """Raises LookupError when this node exports no figures."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    nodes: list[dict[str, Any]] = ray.nodes()
    node = next((node for node in nodes if node["NodeID"] == here), {})
    if not node.get("MetricsExportPort"):
        raise LookupError("Ray exports none here")
    host = node["NodeManagerAddress"]
    return f"http://{f'[{host}]' if ':' in host else host}:{node['MetricsExportPort']}{PATH}"
