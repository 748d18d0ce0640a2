"""`raylm.serve`: a server for the length of a block, and nothing left behind after it."""

import http.client
import logging
import os
import re
import signal
import ssl
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from raylm.config.serving import ServeArgs, ServeConfig
from raylm.errors import ConfigError, ServingError
from raylm.ray_session import ray_session
from raylm.serving import history
from raylm.serving.adapter_survey import open_adapters
from raylm.serving.api_key import read_api_keys
from raylm.serving.app import build_app, checked_models
from raylm.serving.chat_page import chat_page_beside, check_gradio
from raylm.serving.checks import check_port, check_tls
from raylm.serving.engine_args import adapter_model, model_name
from raylm.serving.models import models_of, names_of, needs_gateway
from raylm.serving.processes import Descendants, no_process_left
from raylm.serving.proxy import LOOPBACK, FrontDoor, front_door
from raylm.words import listed

logger = logging.getLogger(__name__)

APP_NAME = "raylm"
_POLL_S = 0.25
_WATCH_S = 2.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server that answers."""

    url: str
    """`http://HOST:PORT`, or https with TLS; OpenAI clients take `url + "/v1"`."""
    model: str
    """What clients send as `model`; of several models the first."""
    proxy: str
    """`haproxy`, `python`, or `running` where Serve was there before."""
    chat_page: str | None = None
    """Address of the chat page, where there is one."""
    adapter: str | None = None
    """What clients send as `model` for the single `adapter`, where there is one."""
    models: tuple[str, ...] = ()
    """All that clients may send as `model` when the server starts: models, aliases and adapters."""

    def wait(self) -> None:
        """Blocks until interrupted. Raises ServingError when the application fails for good."""
        while True:
            time.sleep(_WATCH_S)
            application = _application()
            # After an upgrade that failed, the former replicas still answer.
            failed = application is not None and application.status == "DEPLOY_FAILED" and not is_ready(self.url)
            if application is None or application.status == "DELETING" or failed:
                raise ServingError(self.model, "is no longer served: the application was deleted, or failed for good.")


@contextmanager
def serve(config: ServeConfig) -> Iterator[Endpoint]:
    """Serves a model with OpenAI's routes until the block ends; loopback only unless `host` says otherwise.

    Uses the Ray that is connected, else `cluster_address` or RAY_ADDRESS, else a local one of its own. Ctrl-C and
    SIGTERM end the block, and with it the application and every process it started.
    Raises ConfigError, ModelError, ClusterError or ServingError; a failing engine is reported once with its reason.
    """
    _check(config)
    with (
        no_process_left() as descendants,
        quiet_serve_logger(),
        ray_session(config.cluster_address, num_cpus=os.cpu_count() or 1) as ray,
        # After Ray, whose own handler ends the process within seconds.
        _terminated_like_interrupted(descendants, ray.get_runtime_context().gcs_address),
        descendants.noted(),
    ):
        versions: dict[str, str] = {}
        app = build_app(config, versions=versions)
        revision = _recordable(config)
        num_nodes = sum(node["Alive"] for node in ray.nodes())
        with front_door(config, num_nodes=num_nodes) as door, _deployed(app), descendants.noted():
            descendants.note_folder(door.scratch)
            first = models_of(config)[0]
            endpoint = Endpoint(
                client_url(door),
                model_name(first),
                door.proxy,
                adapter=adapter_model(first),
                models=tuple(name for model in models_of(config) for name in known_names(model)),
            )
            for model in models_of(config):
                logger.info("starting %d engine(s) of %s", max(model.min_replicas, 1), model.model)
            with chat_page_beside(endpoint.url, wanted=config.chat_page) as page:
                _wait_until_ready(endpoint, config)
                descendants.note()
                with _on_record(revision, versions):
                    yield replace(endpoint, chat_page=page.wait_until_ready(config.start_timeout_s))


def _check(config: ServeConfig) -> None:
    """What can be refused before Ray starts."""
    check_config(config)
    import ray

    if not (ray.is_initialized() or config.cluster_address or os.environ.get("RAY_ADDRESS")):
        check_port(config.host, config.port)  # on a cluster, it may be the Serve there that listens on it


def check_config(config: ServeConfig) -> None:
    """What the configuration and the files it names tell by themselves. Raises RaylmError; warns of an open door."""
    needs_gateway(config)
    if config.chat_page:
        check_gradio()
    if config.tls_cert_file is not None and config.tls_key_file is not None:
        check_tls(config.tls_cert_file, config.tls_key_file)
    if not read_api_keys(config.api_key_file) and config.host not in LOOPBACK:
        logger.warning("host %s is reachable from outside and no API key is asked for: set api_key_file", config.host)
    checked_models(config)


@contextmanager
def _deployed(app: Any) -> Iterator[None]:
    """The application, deleted at the end."""
    from ray import serve

    if _application() is not None:
        raise ServingError(
            "cluster", f"runs an application {APP_NAME!r} already.", "Delete it first: raylm deploy --delete"
        )
    try:
        serve.run_many([serve.RunTarget(app, name=APP_NAME, route_prefix="/")], wait_for_applications_running=False)
        yield
    finally:
        logger.info("stopping the server")
        serve.delete(APP_NAME)


def _recordable(config: ServeConfig) -> history.Revision | None:
    """What the cluster may remember of this server; nothing where a secret would stand there."""
    try:
        history.check_storable(config)
    except ConfigError as error:
        logger.warning("raylm deploy cannot roll back to this server: %s %s", error.where, error.problem)
        return None
    return history.prepared(config, has_key=bool(read_api_keys(config.api_key_file)))


@contextmanager
def _on_record(revision: history.Revision | None, versions: dict[str, str]) -> Iterator[None]:
    """Lets `raylm deploy` upgrade what runs, and roll back to it."""
    history.clear()
    if revision is not None:
        history.append(revision, versions)
    try:
        yield
    finally:
        history.clear()


def _wait_until_ready(endpoint: Endpoint, config: ServeConfig) -> None:
    """Returns when the application runs and its address answers.

    Raises ServingError with the engine's reason as soon as Serve gives up, or after `start_timeout_s`.
    """
    started = time.monotonic()
    message = ""
    while time.monotonic() - started < config.start_timeout_s:
        application = _application()
        if application is not None:
            message = message_of(application)
            if application.status == "DEPLOY_FAILED":
                raise ServingError(config.model or "models", engine_reason(message))
            if application.status == "RUNNING" and is_ready(endpoint.url):
                seconds = time.monotonic() - started
                names = listed(endpoint.models)
                logger.info("%s answers at %s/v1 after %.0f s (%s)", names, endpoint.url, seconds, endpoint.proxy)
                return
        time.sleep(_POLL_S)
    raise ServingError(
        config.model or "models", f"did not answer within {config.start_timeout_s:g} s. {message}".strip()
    )


def known_names(model: ServeArgs) -> list[str]:
    """What clients may send as `model` for one model now: its names, and those of the adapters that its root lists."""
    root = open_adapters(model)
    return [*names_of(model), *(f"{model_name(model)}:{name}" for name in (root.names() if root else ()))]


def engine_reason(message: str) -> str:
    """The reason in Serve's report of a failed deployment: our own error where there is one, else its last line."""
    own = re.findall(r"ServingError: (?:.*?: )?(the engine did not start: .+|engine: .+)", message)
    if own:
        return own[-1].strip()
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else "the deployment failed."


def is_ready(url: str) -> bool:
    """True when the server's health route answers 200. url: `http://HOST:PORT`, or https; nothing secret is sent, so
    any certificate will do."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}),  # never through the user's HTTP proxy
        urllib.request.HTTPSHandler(context=context),
    )
    try:
        with opener.open(f"{url}/health", timeout=_WATCH_S) as response:
            return response.status == 200
    except (OSError, http.client.HTTPException):
        return False


def _application() -> Any:
    """Serve's view of our application, or None when there is none."""
    from ray import serve

    return serve.status().applications.get(APP_NAME)


def message_of(application: Any) -> str:
    """What Serve says of an application and its deployments."""
    parts = [application.message, *(deployment.message for deployment in application.deployments.values())]
    return "\n".join(part for part in parts if part)


def client_url(door: FrontDoor) -> str:
    """The address a client on this machine uses."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(door.host, door.host)
    scheme = "https" if door.has_tls else "http"
    return f"{scheme}://[{host}]:{door.port}" if ":" in host else f"{scheme}://{host}:{door.port}"


@contextmanager
def _terminated_like_interrupted(descendants: Descendants, gcs_address: str) -> Iterator[None]:
    """SIGTERM unwinds the block as ctrl-C does, instead of ending the process with its children still there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def unwind(*_: Any) -> NoReturn:
        descendants.end_with_ray(gcs_address, 128 + signal.SIGTERM)
        raise SystemExit(128 + signal.SIGTERM)

    former = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


@contextmanager
def quiet_serve_logger() -> Iterator[None]:
    """Serve writes its own progress to stderr at INFO; ours is enough."""
    import ray.serve  # noqa: F401  (it sets its level when it is imported)

    serve_logger = logging.getLogger("ray.serve")
    former = serve_logger.level
    serve_logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        serve_logger.setLevel(former)
