"""The Serve application: how replicas are placed, and what `serve run` and `serve deploy` build."""

import os
from typing import Any

from raylm.config.serving import ServeArgs
from raylm.serving.adapter_survey import resolve_adapters
from raylm.serving.api_key import digest, read_api_key
from raylm.serving.checks import check_model, check_resources, replica_gpus, warn_without_chat_template
from raylm.serving.engine_args import check_engine_keys, model_name

# The engine queues by itself and batches what it gets, so Serve must not hold requests back.
MAX_ONGOING_REQUESTS = 100_000


def build_app(args: ServeArgs) -> Any:
    """The application, for `serve.run`, for `serve run`, and as the import path of a Serve YAML.

    Raises ModelError, ServingError or ConfigError before an engine starts, and ClusterError where Ray is connected
    and its cluster too small.
    """
    import ray
    import torch
    from ray import serve

    from raylm.serving.replica import Replica

    check_engine_keys(args.engine)
    warn_without_chat_template(args)
    key = read_api_key(args.api_key_file)
    settings = args.model_dump(include=set(ServeArgs.model_fields))  # of a ServeConfig only the application's part
    settings |= resolve_adapters(args)
    replica_args = ServeArgs.model_validate({**settings, "model": check_model(args), "name": model_name(args)})
    if ray.is_initialized():
        resources = ray.cluster_resources()
        check_resources(args, resources)
    else:
        # `serve run` builds the application before it connects: this machine stands for the cluster then.
        resources = {"GPU": float(torch.cuda.device_count())}
    gpus = replica_gpus(args, resources)
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="engine",
        num_replicas=args.num_replicas,
        ray_actor_options={
            "num_cpus": args.num_cpus,
            "num_gpus": gpus,
            "runtime_env": {"env_vars": replica_environment(args, on_cpu=gpus == 0)},
        },
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        max_constructor_retry_count=1,  # an engine that fails once fails again: say why instead
        health_check_period_s=5,
        logging_config={"enable_access_log": False},
    )
    return deployment.bind(replica_args, digest(key) if key else None)


def replica_environment(args: ServeArgs, *, on_cpu: bool) -> dict[str, str]:
    """Variables of the replica's process and of its engine's.

    Without GPU the engine's process computes by itself instead of starting a worker: one start-up and one hop less.
    Its threads run unbound, as many as the machine has cores; of several replicas on a node, on `num_cpus` each.
    """
    environment = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if on_cpu:
        threads = args.num_cpus if args.num_replicas > 1 else os.cpu_count() or 1
        environment |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # AsyncLLM still has its engine process; the worker joins it
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(threads),
        }
    return environment
