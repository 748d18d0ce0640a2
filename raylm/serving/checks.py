"""What can be known to be wrong before a server starts, said in one sentence each."""

import json
import logging
import os
import socket
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raylm.config.engine import gpus_of_engine, spans_nodes
from raylm.config.serving import ServeArgs
from raylm.config.speculation import SpeculationSection
from raylm.errors import ClusterError, ModelError, ServingError
from raylm.models.drafts import check_set_once, portable, speculative_config
from raylm.models.folder import PACKAGE_PREFIX, as_folder, is_adapter, locate

logger = logging.getLogger(__name__)


def check_model(args: ServeArgs) -> str:
    """Checks the model's folder, and returns `model` as a replica with another working directory finds it.

    Raises ModelError for a folder without a servable model, and ServingError for a `max_model_len` above the model's
    limit. A hub id is left to vLLM.
    """
    folder = Path(as_folder(args.model))
    if folder.is_dir():
        if is_adapter(str(folder)):
            raise ModelError(
                args.model, "holds a LoRA adapter, not a whole model.", "Serve the base model or an export."
            )
        _check_length(args, _read_json(folder / "config.json"))
    return args.model if args.model.startswith(PACKAGE_PREFIX) else locate(args.model).path


def check_draft(args: ServeArgs, *, use_gpu: bool) -> SpeculationSection | None:
    """Checks what drafts for the model, and returns `speculation` as a replica with another working directory reads it.

    Raises ConfigError or ModelError.
    """
    check_set_once(args.speculation, args.engine, use_gpu=use_gpu)
    if args.speculation is None:
        return None
    speculative_config(args.speculation, as_folder(args.model), use_gpu=use_gpu, max_model_len=args.max_model_len)
    return portable(args.speculation)


def warn_without_chat_template(args: ServeArgs) -> None:
    """Says that chat will be refused, where neither the tokenizer in the folder nor `engine` brings a template."""
    folder = Path(as_folder(args.model))
    if not folder.is_dir() or "chat_template" in args.engine:
        return
    in_file = any((folder / f"chat_template.{suffix}").is_file() for suffix in ("jinja", "json"))
    if not in_file and not _read_json(folder / "tokenizer_config.json").get("chat_template"):
        logger.warning(
            "%s: the tokenizer has no chat template: /v1/chat/completions answers 400, /v1/completions works. "
            "Set engine.chat_template to a Jinja file to chat.",
            args.model,
        )


def warn_of_remote_code(args: ServeArgs) -> None:
    """Says that the model's own Python files will run, where `engine` allows it; they do not by default."""
    if args.engine.get("trust_remote_code"):
        logger.warning(
            "%s: engine.trust_remote_code is on: Python files of the model run on every replica, with its rights.",
            args.model,
        )


def check_tls(cert_file: str, key_file: str) -> None:
    """Raises ServingError when the two files are not a certificate and its key without passphrase."""
    for name, file in (("tls_cert_file", cert_file), ("tls_key_file", key_file)):
        if not os.access(file, os.R_OK):
            raise ServingError(f"{name} {file}", "cannot be read.", "Give a PEM file that the server may read.")
    try:
        # An empty passphrase, or OpenSSL would ask for one on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert_file, key_file, password="")
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or str(error)
        problem = f"are not a certificate and its key without passphrase: {reason.lower().replace('_', ' ')}."
        raise ServingError(f"tls_cert_file {cert_file} and tls_key_file {key_file}", problem) from None


def check_port(host: str, port: int) -> None:
    """Raises ServingError when nothing can listen on host:port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServingError(
                f"{host}:{port}", f"cannot be listened on: {error.strerror}.", "Set another port or host."
            ) from None


def replica_gpus(args: ServeArgs, resources: Mapping[str, float]) -> float:
    """GPUs of one replica on a cluster with these resources."""
    if args.num_gpus != "auto":
        return args.num_gpus
    return float(gpus_of_engine(args.engine)) if resources.get("GPU") else 0.0


def largest_node(nodes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The most of each resource that one of Ray's living nodes has."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    return {kind: max(node.get(kind, 0.0) for node in alive) for kind in ("CPU", "GPU")} if alive else {}


def check_resources(
    models: Sequence[ServeArgs], resources: Mapping[str, float], largest: Mapping[str, float] | None = None
) -> None:
    """Raises ClusterError when the cluster, whatever else runs on it, is too small for the replicas that start.

    resources: of the cluster; largest: the most of each that one node has.
    """
    for args in models:
        gpus, there = replica_gpus(args, resources), (resources if largest is None else largest).get("GPU", 0.0)
        if gpus > there and not spans_nodes(args.engine) and gpus <= resources.get("GPU", 0.0):
            raise ClusterError(
                "num_gpus",
                f"a replica takes {gpus:g} GPUs, and no node has more than {there:g}.",
                "Set engine.distributed_executor_backend=ray, which spreads the engine's ranks over nodes.",
            )
    for kind, per_replica in (("CPU", _cpus), ("GPU", lambda args: replica_gpus(args, resources))):
        counts = [(max(args.min_replicas, 1), per_replica(args)) for args in models]
        needed, there = sum(count * each for count, each in counts), resources.get(kind, 0.0)
        if needed > there:
            what = " and ".join(f"{count} replicas of {each:g} {kind}s" for count, each in counts)
            raise ClusterError(
                "num_replicas",
                f"{what} need {needed:g}, the cluster has {there:g}.",
                f"Ask for fewer replicas, or set num_{kind.lower()}s.",
            )


def _cpus(args: ServeArgs) -> float:
    return float(args.num_cpus)


def _check_length(args: ServeArgs, config: Mapping[str, Any]) -> None:
    """A longer length than the positions a model was made for; with a rope scaling vLLM works out the limit."""
    text = config.get("text_config", config)
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    limit = text.get("max_position_embeddings")
    if args.max_model_len is None or limit is None or rope.get("rope_type", rope.get("type", "default")) != "default":
        return
    if args.max_model_len > limit:
        raise ServingError(
            "max_model_len", f"{args.max_model_len} is above the model's limit of {limit} tokens.", "Lower it."
        )


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(str(file), f"is not valid JSON: {error}.", "Copy the model folder again.") from None
