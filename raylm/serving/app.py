"""The Serve application: how replicas are placed, and what `serve run` and `serve deploy` build."""

import os
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

from raylm.config.engine import check_engine_keys, gpus_of_engine, spans_nodes
from raylm.config.serving import ServeArgs
from raylm.errors import RaylmError
from raylm.serving.adapter_survey import resolve_adapters
from raylm.serving.checks import (
    check_draft,
    check_model,
    check_resources,
    largest_node,
    replica_gpus,
    warn_of_remote_code,
    warn_without_chat_template,
)
from raylm.serving.engine_args import RESERVED
from raylm.serving.guard import GuardSettings, guard_settings
from raylm.serving.models import deployment_name, models_of, names_of, needs_gateway
from raylm.serving.version import versioned

# The engine queues by itself and batches what it gets, so Serve must not hold requests back.
MAX_ONGOING_REQUESTS = 100_000


DIRECT = "engine"
"""Name of the deployment that clients reach without a gateway."""
GATEWAY = "gateway"


def build_app(
    args: ServeArgs,
    *,
    retained: Sequence[tuple[ServeArgs, bool]] = (),
    versions: MutableMapping[str, str] | None = None,
) -> Any:
    """The application, for `serve.run`, for `serve run`, and as the import path of a Serve YAML.

    One deployment that clients reach directly, or a gateway before one deployment for each model (models.py).
    retained: behind a gateway, models of the running application that stay up although no name leads to them, and
    whether each was alone there.
    versions: of deployments that are to keep theirs; those of the others are added (version.py).
    Raises ModelError, ServingError or ConfigError before an engine starts, and ClusterError where Ray is connected
    and its cluster too small.
    """
    import ray
    import torch

    if ray.is_initialized():
        resources = ray.cluster_resources()
        check_resources(models_of(args), resources, largest_node(ray.nodes()))
    else:
        # `serve run` builds the application before it connects: this machine stands for the cluster then.
        resources = {"GPU": float(torch.cuda.device_count())}
    models = checked_models(args, resources, warn=True)
    versions = {} if versions is None else versions
    guard = guard_settings(args)
    if not needs_gateway(args):
        return _direct(models[0], guard, resources, versions)
    running = [*((model, len(models) == 1) for model in models), *retained]
    return _behind_gateway(models, running, guard, resources, versions)


def checked_models(
    args: ServeArgs, resources: Mapping[str, float] | None = None, *, warn: bool = False
) -> list[ServeArgs]:
    """The models one by one, with the paths in them as a replica with another working directory finds them.

    resources: of the cluster, as far as it is known. Raises ModelError, ServingError or ConfigError, naming the entry
    of `models`.
    """
    checked = []
    for index, model in enumerate(models_of(args)):
        with _naming(f"models.{index} ({model.name})" if args.models else ""):
            check_engine_keys(model.engine, RESERVED)
            found: dict[str, Any] = {"model": check_model(model)}
            use_gpu = resources is None or replica_gpus(model, resources) > 0
            found |= {"speculation": check_draft(model, use_gpu=use_gpu), **resolve_adapters(model, warn=warn)}
            if warn:
                warn_without_chat_template(model)
                warn_of_remote_code(model)
            checked.append(model.model_copy(update=found))
    return checked


@contextmanager
def _naming(entry: str) -> Iterator[None]:
    """Errors of the block say which entry they are about."""
    try:
        yield
    except RaylmError as error:
        where = f"{entry}: {error.where}" if entry else error.where
        raise type(error)(where, error.problem, error.remedy) from None


def _direct(
    args: ServeArgs, guard: GuardSettings, resources: Mapping[str, float], versions: MutableMapping[str, str]
) -> Any:
    """One model, whose replicas clients reach without another hop."""
    from ray import serve

    from raylm.serving.replica import Replica

    options = {"num_replicas": args.num_replicas} | _engine_options(args, resources)
    deployment = serve.deployment(serve.ingress()(Replica), name=DIRECT, **options)
    return versioned(deployment, versions, args, guard).bind(args, guard)


def _behind_gateway(
    models: Sequence[ServeArgs],
    running: Sequence[tuple[ServeArgs, bool]],
    guard: GuardSettings,
    resources: Mapping[str, float],
    versions: MutableMapping[str, str],
) -> Any:
    """A gateway before the `running` models, that knows the names of `models`."""
    from ray import serve

    from raylm.serving.gateway import Gateway, Route
    from raylm.serving.relay import EngineReplica

    engines = {}
    for model, alone in running:
        options = _replica_count(model) | _engine_options(model, resources, alone=alone)
        if model.routing == "prefix":
            options["request_router_config"] = {"request_router_class": "raylm.serving.prefix_router:PrefixRouter"}
        deployment = serve.deployment(EngineReplica, name=deployment_name(model), **options)
        engines[deployment_name(model)] = versioned(deployment, versions, model).bind(model)
    routes = [
        Route(
            deployment_name(model),
            tuple(names_of(model)),
            by_prefix=model.routing == "prefix",
            may_sleep=model.min_replicas == 0,
            several=model.max_replicas > 1,
        )
        for model in models
    ]
    gateway = serve.deployment(
        serve.ingress()(Gateway),
        name=GATEWAY,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=max(model.drain_timeout_s for model, _ in running),
        **_COMMON,
    )
    cors = _cors(models)
    return versioned(gateway, versions, routes, guard, sorted(engines), cors).bind(routes, engines, guard, cors)


def _cors(models: Sequence[ServeArgs]) -> dict[str, Any]:
    """What a gateway answers preflights by, as arguments of CORSMiddleware. They name no model, so what one model lets
    in is let in; vLLM's defaults."""
    opened = [model.engine for model in models if model.engine.get("allowed_origins")]
    found: dict[str, Any] = {"allow_credentials": any(engine.get("allow_credentials") for engine in opened)}
    for ours, name in (("allow_origins", "origins"), ("allow_methods", "methods"), ("allow_headers", "headers")):
        values = [engine.get(f"allowed_{name}", "*") for engine in opened]
        found[ours] = sorted({one for value in values for one in ([value] if isinstance(value, str) else value)})
    return found


_COMMON: dict[str, Any] = {
    "max_ongoing_requests": MAX_ONGOING_REQUESTS,
    "max_surge_percent": 100,  # an upgrade starts the new replica and waits for it before it stops the old one
    "graceful_shutdown_wait_loop_s": 0.5,
    "health_check_period_s": 2,  # Serve replaces a replica at the third failure in a row
    "logging_config": {"enable_access_log": False},
}


def _engine_options(args: ServeArgs, resources: Mapping[str, float], *, alone: bool = True) -> dict[str, Any]:
    """What every deployment of an engine gets. alone: no other model's engine is on the same node."""
    gpus = replica_gpus(args, resources)
    spread = gpus > 0 and spans_nodes(args.engine)
    return {
        "ray_actor_options": {
            "num_cpus": args.num_cpus,
            "num_gpus": 0 if spread else gpus,
            "runtime_env": {"env_vars": replica_environment(args, on_cpu=gpus == 0, alone=alone)},
        },
        "max_constructor_retry_count": 1,  # an engine that fails once fails again: say why instead
        "graceful_shutdown_timeout_s": args.drain_timeout_s,
        **(_placement(args.num_cpus, gpus_of_engine(args.engine)) if spread else {}),
        **_COMMON,
    }


def _placement(num_cpus: int, gpus: int) -> dict[str, Any]:
    """A placement group for the replica and the ranks of its engine, which are actors in it with a GPU each: the first
    beside the replica, the others on as few nodes as may be."""
    bundles = [{"CPU": num_cpus, "GPU": 1}, *({"GPU": 1} for _ in range(gpus - 1))]
    return {"placement_group_bundles": bundles, "placement_group_strategy": "PACK"}


def _replica_count(args: ServeArgs) -> dict[str, Any]:
    """A number, or bounds. At first one replica runs even where the minimum is none: a bad model shows at once."""
    if not args.is_autoscaled:
        return {"num_replicas": args.num_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": args.min_replicas,
            "max_replicas": args.max_replicas,
            "initial_replicas": max(args.min_replicas, 1),
            "target_ongoing_requests": args.target_ongoing_requests,
            "downscale_delay_s": args.downscale_delay_s,
        }
    }


def replica_environment(args: ServeArgs, *, on_cpu: bool, alone: bool = True) -> dict[str, str]:
    """Variables of the replica's process and of its engine's.

    Without GPU the engine's process computes by itself instead of starting a worker: one start-up and one hop less.
    Its threads run unbound, as many as the machine has cores; of several replicas, or models (not `alone`), on a node,
    on `num_cpus` each.
    """
    environment = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if on_cpu:
        threads = (os.cpu_count() or 1) if alone and args.max_replicas == 1 else args.num_cpus
        environment |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # AsyncLLM still has its engine process; the worker joins it
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(threads),
        }
    return environment
