"""A Ray to work on: the one that is there, or a local one for the length of the call."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from raylm.errors import ClusterError, ClusterTokenError
from raylm.words import counted

logger = logging.getLogger(__name__)

_OWN_RAY = "RAYLM_OWN_RAY"
LOCAL_ENVIRONMENT = {
    _OWN_RAY: "1",
    "RAY_worker_niceness": "0",  # Ray's workers run at nice 15 otherwise
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process a training, to look whether this only node is taken away
    "RAY_USAGE_STATS_ENABLED": "0",
}
_IMPORT_ENVIRONMENT = {
    # Printed on stdout where a machine has few cores and runs several trainings.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "PYTHON worker processes have been started on node",
}
"""What Ray reads when it is imported."""
_TOKEN_SIGNS = ("AuthenticationError", "Unauthenticated", "InvalidAuthToken", "Unauthorized", "Forbidden")
"""In Ray's errors where a cluster answers 401 or 403, by its own protocol or by HTTP."""


@contextmanager
def ray_session(address: str | None, *, num_cpus: int, environment: Mapping[str, str] | None = None) -> Iterator[Any]:
    """Yields the `ray` module, connected: to the session that is open, else to `address`, RAY_ADDRESS or the cluster
    of this job, else to a local instance with `num_cpus` logical CPUs that ends with the block.

    environment: variables a local instance starts with. Raises ClusterError when a named cluster does not answer.
    """
    for name, value in _IMPORT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield ray
        return
    _quiet_ray()
    remote = address or os.environ.get("RAY_ADDRESS")
    if remote:
        try:
            with _sigterm_kept():
                ray.init(address=remote, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
            raise _refused(remote, error) from None
        logger.info("connected to the Ray cluster at %s", remote)
    else:
        with environment_variables({**LOCAL_ENVIRONMENT, **(environment or {})}):
            _start_local(ray, num_cpus)
        cores = os.cpu_count() or 1
        booked = "" if num_cpus == cores else f" for its tasks to book, on {counted(cores, 'core')}"
        logger.info("started a local Ray with %s%s", counted(num_cpus, "logical CPU"), booked)
    own = {} if remote else {_OWN_RAY: "1"}
    try:
        with environment_variables(own):
            yield ray
    finally:
        ray.shutdown()


def _refused(address: str, error: BaseException) -> ClusterError:
    """Why a cluster cannot be connected to. Ray says in the cause of its error alone that a token was asked for."""
    cause: BaseException | None = error
    while cause is not None:
        if any(sign in f"{type(cause).__name__}: {cause}" for sign in _TOKEN_SIGNS):
            return ClusterTokenError(
                f"Ray cluster {address}",
                "asks for a token, and that of this process is missing or another.",
                "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the cluster's (or have it in ~/.ray/auth_token).",
            )
        cause = cause.__cause__ or cause.__context__
    reason = next(iter(str(error).splitlines()), "")
    return ClusterError(f"Ray cluster {address}", f"does not answer: {reason}", "Start it, or unset RAY_ADDRESS.")


def is_local(address: str | None) -> bool:
    """Whether `ray_session` would start a Ray of its own."""
    ray = sys.modules.get("ray")  # not imported: not connected either
    return not ((ray and ray.is_initialized()) or address or os.environ.get("RAY_ADDRESS"))


def in_own_ray() -> bool:
    """True in the driver and the workers of a local Ray that this file started: it has no dashboard."""
    return os.environ.get(_OWN_RAY) == "1"


def _start_local(ray: Any, num_cpus: int) -> None:
    """Ray gives a new node 30 s to answer, which a busy machine may miss once. Raises ClusterError."""
    for attempt in (1, 2):
        try:
            with _sigterm_kept():
                ray.init(
                    address="local",
                    num_cpus=num_cpus,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                )
            return
        except Exception as error:  # Ray raises a bare Exception here
            ray.shutdown()
            if attempt == 2:
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                raise ClusterError("a local Ray", f"does not start: {reason}", "Free memory, disk or CPU.") from error
            logger.warning("a local Ray did not start in time, trying once more: %s", error)


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """SIGTERM is this process's own again once Ray is connected: whoever handled it, else Ray's handler, which exits.

    Ray's core takes it over while it connects (Ray 2.60, RayLog::InstallFailureSignalHandler), and would print a stack
    trace and abort; until Python has it again, it waits. Not for the whole of `ray.init`: the processes that are
    started there would never hear of it.
    """
    import ray._private.worker as worker

    connect, former = worker.connect, signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def held(*arguments: Any, **options: Any) -> Any:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        try:
            return connect(*arguments, **options)
        finally:
            own = former not in (None, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, former if own else signal.getsignal(signal.SIGTERM))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])

    worker.connect = held
    try:
        yield
    finally:
        worker.connect = connect


def inside_ray_job() -> bool:
    """True in the driver of `ray job submit`."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def _quiet_ray() -> None:
    """Ray reports every dataset execution at INFO, and its own safe default (token authentication) as a warning."""
    import ray.data  # noqa: F401  (it sets its level when it is imported)

    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def environment_variables(values: Mapping[str, str]) -> Iterator[None]:
    """Sets variables that are not set yet, for the length of the block."""
    added = [name for name in values if name not in os.environ]
    os.environ.update({name: values[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
