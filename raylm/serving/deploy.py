"""`raylm deploy`: an application that stays on the cluster, and is replaced without losing a request.

Serve starts the new replicas beside the old ones and stops those when the new answer (`max_surge_percent`). Behind a
gateway a new one waits until every engine is up, and the models that are to go stay until it has taken over. When the
new version fails, the former configuration is set again: its replicas never stopped.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from raylm.config.serving import ServeArgs, ServeConfig
from raylm.errors import ClusterError, ClusterTokenError, ConfigError, RaylmError, ServingError
from raylm.ray_session import ray_session
from raylm.serving import history
from raylm.serving.api_key import read_api_keys
from raylm.serving.app import DIRECT, build_app
from raylm.serving.checks import replica_gpus
from raylm.serving.endpoint import (
    APP_NAME,
    check_config,
    client_url,
    engine_reason,
    is_ready,
    message_of,
    quiet_serve_logger,
)
from raylm.serving.history import Revision
from raylm.serving.models import deployment_name, models_of, names_of, needs_gateway
from raylm.serving.proxy import lasting_front_door, running_front_door, shut_down_if_empty

logger = logging.getLogger(__name__)

_POLL_S = 0.5
_ROOM_S = 30.0
_LOCK, _RELEASE_S = "raylm-deploy", 3.0


@dataclass(frozen=True, slots=True)
class Deployment:
    """What is deployed."""

    url: str
    """`http://HOST:PORT`; OpenAI clients take `url + "/v1"`."""
    revision: int
    """Counts the deployments of this application from 1."""
    models: list[list[str]]
    """The names of each model, the name proper first."""
    status: str
    """Serve's word for the application: RUNNING, DEPLOYING, UNHEALTHY, …"""
    replicas: dict[str, int]
    """Replicas that run, by deployment."""
    before: list[int]
    """Former revisions that a rollback leads to, the oldest first."""


def deploy_app(config: ServeConfig) -> Deployment:
    """Puts the application onto the Serve that runs on the cluster, or starts one there, and leaves it.

    Returns when the new version answers and the old one takes no more requests. Uses the Ray that is connected, else
    `cluster_address`, RAY_ADDRESS, or the cluster that `ray start` has put this machine into.
    Raises RaylmError; whatever fails, an application that ran before goes on running as it was.
    """
    if config.chat_page:
        raise ConfigError(
            "chat_page",
            "is a page of raylm serve, which ends with it.",
            "On a cluster the page is an application of its own: serve/chat_page.yaml.",
        )
    check_config(config)
    history.check_storable(config)
    with _cluster(config.cluster_address), _alone():
        former = next(reversed(history.revisions()), None)
        return _replace(config, former, {})


def roll_back(cluster_address: str | None = None) -> Deployment:
    """Puts the former configuration back, as `deploy` would. The files it names are read as they are now.

    Where nothing runs any more, the former one is that before the last that the cluster remembers. Raises ServingError
    when there is none, or its API key cannot be read here; whatever fails, the cluster goes on remembering.
    """
    with _cluster(cluster_address), _alone():
        known = history.revisions()
        if len(known) < 2:
            raise ServingError("rollback", "there is no former version.", "Deploy the one you want.")
        target, current = known[-2], known[-1]
        _check_key(target)
        deployment = _replace(target.config, current, {}, going_back=True)
        logger.info("revision %d is back in place of %d", target.number, current.number)
        return deployment


def deployed(cluster_address: str | None = None) -> Deployment:
    """What is deployed now. Raises ServingError when nothing is."""
    with _cluster(cluster_address):
        return _described()


def delete(cluster_address: str | None = None) -> None:
    """Ends the application, forgets its history, and ends Serve when nothing else runs on it."""
    from ray import serve

    with _cluster(cluster_address), _alone():
        if _application() is None:
            raise ServingError("cluster", "has nothing deployed.")
        serve.delete(APP_NAME)
        history.clear()
        shut_down_if_empty()


def _replace(
    config: ServeConfig, former: Revision | None, versions: dict[str, str], *, going_back: bool = False
) -> Deployment:
    """The new configuration in place of the former, or an error and the former as it was."""
    running = _application()
    if running is None:  # what the cluster remembers has ended without `delete`: it says nothing about what runs
        former = None
    else:
        _check_shape(config, running)
    restore = _restorer(former) if running is not None else None
    leaving = _leaving(config, former) if former is not None and needs_gateway(config) else []
    known = dict(former.versions) if former is not None else {}
    versions |= {deployment_name(model): known[deployment_name(model)] for model, _ in leaving}
    app = build_app(config, retained=leaving, versions=versions)
    if running is not None:
        _check_room(config, known, versions)
    import ray

    revision = history.prepared(config, has_key=bool(read_api_keys(config.api_key_file)))
    door, started = lasting_front_door(config, num_nodes=sum(node["Alive"] for node in ray.nodes()))
    url = client_url(door)
    try:
        _run(app, config, url)
        if leaving:
            versions = {name: version for name, version in versions.items() if name in _deployments(config)}
            _run(build_app(config, versions=versions), config, url)
    except BaseException as error:
        if running is None:
            _give_up(started)
            raise
        logger.warning("the new version failed; the former one goes on answering")
        if restore is not None:
            _run(restore, config, url)
        if isinstance(error, ServingError):
            raise ServingError(error.where, error.problem, "The former version goes on answering.") from None
        raise
    if going_back:
        history.go_back(versions)
    else:
        history.append(revision, versions)
    return _described()


def _restorer(former: Revision | None) -> Any:
    """The former application as it runs now, with the versions it runs under; None where it cannot be built here."""
    if former is None:
        return None
    try:
        _check_key(former)
        return build_app(former.config, versions=dict(former.versions))
    except RaylmError as error:
        logger.warning("the running configuration cannot be set again from here if the new one fails: %s", error)
        return None


def _check_key(revision: Revision) -> None:
    """Never lets an application that asked for a key come back without one."""
    if revision.has_key and not read_api_keys(revision.config.api_key_file):
        raise ServingError(
            f"revision {revision.number}", "asked for the API key in VLLM_API_KEY, which is not set.", "Set it."
        )


def _check_shape(config: ServeConfig, running: Any) -> None:
    is_direct, becomes_direct = DIRECT in running.deployments, not needs_gateway(config)
    if is_direct != becomes_direct:
        now, then = ("without", "with") if is_direct else ("with", "without")
        raise ServingError(
            "gateway",
            f"the application runs {now} a gateway, the new one would run {then}: Serve cannot change that in place.",
            "Set gateway=never."
            if is_direct and config.gateway == "always"
            else "Set gateway=always from the start, or delete the application first: raylm deploy --delete"
            if is_direct
            else "Set gateway=always.",
        )


def _check_room(config: ServeConfig, known: dict[str, str], versions: dict[str, str]) -> None:
    """Raises ClusterError when the new version does not fit beside the old one, even after replicas that are on their
    way out have gone."""
    import ray

    resources = ray.cluster_resources()
    needed = {"CPU": 0.0, "GPU": 0.0}
    for kind in needed:
        changed = 0.0
        for model in models_of(config):
            name = deployment_name(model) if needs_gateway(config) else DIRECT
            each = float(model.num_cpus) if kind == "CPU" else replica_gpus(model, resources)
            if name not in known:
                needed[kind] += max(model.min_replicas, 1) * each
            elif known[name] != versions[name]:
                changed = max(changed, each)  # one after the other
        needed[kind] += changed
    deadline = time.monotonic() + _ROOM_S
    while lacking := [kind for kind in needed if needed[kind] > ray.available_resources().get(kind, 0.0)]:
        if time.monotonic() > deadline:
            kind = lacking[0]
            raise ClusterError(
                "cluster",
                f"an upgrade runs the new version beside the old one: it needs {needed[kind]:g} {kind}s more than are "
                "in use now.",
                "Add a node, or delete the application first: raylm deploy --delete",
            )
        time.sleep(_POLL_S)


def _leaving(config: ServeConfig, former: Revision) -> list[tuple[ServeArgs, bool]]:
    """Models of the former configuration that the new one lacks: they stay until the new gateway has taken over."""
    if DIRECT in former.versions:
        return []
    staying, old = _deployments(config), models_of(former.config)
    leaving = [model for model in old if deployment_name(model) not in staying]
    return [(model, len(old) == 1) for model in leaving if deployment_name(model) in former.versions]


def _deployments(config: ServeConfig) -> set[str]:
    return {deployment_name(model) for model in models_of(config)}


def _run(app: Any, config: ServeConfig, url: str) -> None:
    """Gives Serve the application and returns when it runs and answers. Raises ServingError with the reason."""
    from ray import serve

    serve.run_many([serve.RunTarget(app, name=APP_NAME, route_prefix="/")], wait_for_applications_running=False)
    where = config.model or "models"
    message, deadline = "", time.monotonic() + config.start_timeout_s
    while time.monotonic() < deadline:
        application = _application()
        if application is not None:
            message = message_of(application)
            if application.status == "DEPLOY_FAILED":
                raise ServingError(where, engine_reason(message))
            if application.status == "RUNNING" and is_ready(url):
                return
        time.sleep(_POLL_S)
    raise ServingError(where, f"did not answer within {config.start_timeout_s:g} s. {message}".strip())


def _give_up(started: bool) -> None:
    """Nothing ran before: nothing stays."""
    from ray import serve

    serve.delete(APP_NAME)
    if started:
        shut_down_if_empty()


def _described() -> Deployment:
    application, door = _application(), running_front_door()
    if application is None or door is None:
        raise ServingError("cluster", "has nothing deployed.", "Deploy a model: raylm deploy MODEL")
    known = history.revisions()
    models = [names_of(model) for model in models_of(known[-1].config)] if known else []
    return Deployment(
        url=client_url(door),
        revision=known[-1].number if known else 0,
        models=models,
        status=str(application.status.value),
        replicas={
            name: sum(count for state, count in deployment.replica_states.items() if state == "RUNNING")
            for name, deployment in application.deployments.items()
        },
        before=[revision.number for revision in known[:-1]],
    )


def _application() -> Any:
    """Serve's view of our application, or None when there is none. Starts no Serve."""
    if running_front_door() is None:
        return None
    from ray import serve

    return serve.status().applications.get(APP_NAME)


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """Connected to a cluster that outlives this process."""
    import ray

    named = next((each for each in (address, os.environ.get("RAY_ADDRESS")) if each not in (None, "", "auto")), None)
    found = named or _recorded_address()
    none_runs = ClusterError(
        "raylm deploy", "found no running Ray cluster.", "Start one: ray start --head, or set cluster_address."
    )
    if found is None and not ray.is_initialized():
        raise none_runs
    try:
        with quiet_serve_logger(), ray_session(found, num_cpus=0):
            yield
    except ClusterError as error:
        if named or error.where != f"Ray cluster {found}" or isinstance(error, ClusterTokenError):
            raise
        raise none_runs from None  # the record of a cluster that is gone


class _Lock:
    """An actor with a name, which only one can have; it ends with the driver that made it, however that ends."""


@contextmanager
def _alone() -> Iterator[None]:
    """Nobody else changes the application meanwhile. Raises ServingError where somebody does."""
    import ray

    holder = ray.remote(num_cpus=0)(_Lock).options(name=_LOCK, namespace=_LOCK)
    deadline = time.monotonic() + _RELEASE_S
    while True:
        try:
            lock = holder.remote()
            break
        except ValueError:  # the name is taken
            if time.monotonic() > deadline:
                raise ServingError(
                    "cluster", "another raylm deploy changes the application.", "Wait until it has ended."
                ) from None
            time.sleep(_POLL_S)
    try:
        yield
    finally:
        ray.kill(lock)


def _recorded_address() -> str | None:
    """The address that `ray start` left in Ray's temporary folder, which RAY_TMPDIR names.

    Ray's own `auto` also takes any Ray process of the machine, the private one of another program among them. Ray 2.60
    has no public way to ask for the record alone.
    """
    from ray._private.utils import read_ray_address

    return read_ray_address() or None
