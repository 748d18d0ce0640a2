"""The pass-through mapping of engine arguments, under vLLM's own names."""

from collections.abc import Mapping
from typing import Any

from raylm.errors import ConfigError


def check_engine_keys(engine: Mapping[str, Any], reserved: Mapping[str, str]) -> None:
    """Raises ConfigError for a key with dashes, or one that is set by a field of ours.

    reserved: vLLM's name -> the field that sets it.
    """
    for key in engine:
        if "-" in key:
            raise ConfigError(f"engine.{key}", "has dashes.", f"Write engine.{key.replace('-', '_')}.")
        if key in reserved:
            raise ConfigError(f"engine.{key}", "is set by a key of its own.", f"Set {reserved[key]} instead.")


def gpus_of_engine(engine: Mapping[str, Any]) -> int:
    """GPUs that one engine computes on, where there are any: of all its tensor and pipeline parallel ranks."""
    return int(engine.get("tensor_parallel_size", 1)) * int(engine.get("pipeline_parallel_size", 1))


def spans_nodes(engine: Mapping[str, Any]) -> bool:
    """Whether the ranks of one engine are Ray actors, which may be on several nodes."""
    return engine.get("distributed_executor_backend") == "ray"
