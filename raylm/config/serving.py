"""The configuration of a server."""

from typing import Annotated, Any, Literal

from pydantic import Field

from raylm.config.base import Section


class ServeConfig(Section):
    """Everything `raylm serve`, `raylm.serve`, `serve run` and a Serve YAML need."""

    model: str = Field(min_length=1)
    """Hub id, folder or GGUF file; `pkg://PACKAGE/FILE` names a file that an installed Python package ships."""
    name: str | None = None
    """Model name that clients send; default: the last part of the path."""
    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback should have an API key."""
    port: int = Field(8000, ge=1, le=65535)
    """Port to listen on."""
    api_key_file: str | None = None
    """File whose first line is the key that clients must send as a bearer token."""
    max_model_len: Annotated[int, Field(ge=8)] | None = None
    """Longest prompt plus answer in tokens; default: the model's own."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type the engine computes in; `auto` is the model's, or float32 on a CPU without bfloat16 arithmetic."""
    kv_cache_gib: float = Field(1.0, gt=0)
    """Key-value cache on a machine without GPU."""
    num_replicas: int = Field(1, ge=1)
    """Copies of the engine."""
    num_cpus: float = Field(1.0, ge=0)
    """Logical CPUs of one replica."""
    num_gpus: float | Literal["auto"] = "auto"
    """GPUs of one replica; `auto` is one where the cluster has any."""
    proxy: Literal["auto", "haproxy", "python"] = "auto"
    """What listens on the port: HAProxy straight to the replicas, or Ray Serve's Python proxy; `auto` takes HAProxy
    when Ray is started by this call and its binary is there."""
    cluster_address: str | None = None
    """Address of a running cluster; without it as in `cluster.address` of training."""
    engine: dict[str, Any] = {}
    """Further engine arguments under vLLM's own names, such as `enforce_eager`."""
