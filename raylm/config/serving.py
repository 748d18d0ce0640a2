"""The configuration of a server: the application, and the endpoint it is reached at."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from raylm.config.base import Section
from raylm.config.limits import LimitsSection
from raylm.config.speculation import SpeculationSection

Count = Annotated[int, Field(ge=1)]
Bounds = tuple[Annotated[int, Field(ge=0)], Count]


class ModelArgs(Section):
    """One model of the application: its name, its engine, and its replicas."""

    model: str = ""
    """Hub id, folder or GGUF file; `pkg://PACKAGE/FILE` names a file that an installed Python package ships."""
    name: Annotated[str, Field(min_length=1)] | None = None
    """Model name that clients send; default: the last part of `model`."""
    aliases: list[Annotated[str, Field(min_length=1)]] = []
    """Further names for the same model; `model` of an answer is the name that was asked for."""
    max_model_len: Annotated[int, Field(ge=8)] | None = None
    """Longest prompt plus answer in tokens; default: the model's own."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type the engine computes in; `auto` is the model's on a GPU, and on a CPU bfloat16 where the processor
    multiplies it natively (AMX, AVX512-BF16), else float32."""
    kv_cache_gib: float = Field(1.0, gt=0)
    """Key-value cache of one replica without GPU, in GiB; on a GPU it is `engine.gpu_memory_utilization`."""
    num_replicas: Count | Bounds = 1
    """Copies of the engine; `[min, max]` scales between the two by the requests at work, down to none where min is 0.
    """
    target_ongoing_requests: float = Field(16, gt=0)
    """With `[min, max]`: requests at work in one replica that scaling aims at."""
    downscale_delay_s: float = Field(600, ge=0)
    """With `[min, max]`: seconds of less work before a replica is given up."""
    routing: Literal["balanced", "prefix"] = "balanced"
    """Which of several replicas answers: the less busy of two, or the one that has seen the conversation's beginning,
    whose prefix cache then spares the work."""
    drain_timeout_s: float = Field(30, ge=0)
    """Seconds that a replica which is replaced or stopped has for the requests it is at."""
    num_cpus: int = Field(1, ge=1)
    """CPUs of one replica; without GPU also the engine's compute threads when there are several replicas."""
    num_gpus: float | Literal["auto"] = "auto"
    """GPUs of one replica, all on one node unless `engine.distributed_executor_backend` is `ray`; `auto` is
    `engine.tensor_parallel_size` times `engine.pipeline_parallel_size`, or 1, where the cluster has GPUs, else 0."""
    tool_parser: str = Field("auto", min_length=1)
    """What reads tool calls out of an answer: one of vLLM's parsers by name, `none`, or `auto`: by the chat template,
    where that is unmistakable (docs/serving.md)."""
    speculation: SpeculationSection | None = None
    """Speculative decoding: a method, and the draft model where it has one (docs/speculative-decoding.md)."""
    adapter: Annotated[str, Field(min_length=1)] | None = None
    """One LoRA adapter to serve beside the model: a PEFT adapter folder or its s3://, gs://, … address; clients ask
    for MODEL:NAME, or NAME, its last part."""
    adapters: Annotated[str, Field(min_length=1)] | None = None
    """Folder, or s3://, gs://, … address, that holds PEFT adapter folders: each is served under its name."""
    max_adapters: int = Field(8, ge=1)
    """Adapters whose weights an engine holds at once; beyond it the one that was used least recently gives way."""
    max_adapter_rank: Annotated[int, Field(ge=1, le=512)] | None = None
    """Highest rank an adapter may have; default: the highest among those that are there at the start, else 64."""
    engine: dict[str, Any] = {}
    """Further engine and server arguments under vLLM's own names, with underscores, such as `enforce_eager`."""

    @model_validator(mode="after")
    def one_key_names_the_tool_parser(self) -> Self:
        if self.tool_parser != "auto" and "tool_call_parser" in self.engine:
            raise ValueError("tool_parser excludes engine.tool_call_parser. Set one of them")
        return self

    @model_validator(mode="after")
    def adapters_come_from_one_place(self) -> Self:
        if self.adapter is not None and self.adapters is not None:
            raise ValueError("adapter and adapters exclude each other: put the adapter below the root, or drop one")
        return self

    @model_validator(mode="after")
    def the_smallest_number_of_replicas_is_not_above_the_largest(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"num_replicas=[{self.min_replicas}, {self.max_replicas}]: the first is the smaller one")
        return self

    @property
    def is_autoscaled(self) -> bool:
        """True when `num_replicas` is a pair of bounds."""
        return isinstance(self.num_replicas, tuple)

    @property
    def min_replicas(self) -> int:
        """Replicas there are without any work."""
        return self.num_replicas[0] if isinstance(self.num_replicas, tuple) else self.num_replicas

    @property
    def max_replicas(self) -> int:
        """Replicas there are at most."""
        return self.num_replicas[1] if isinstance(self.num_replicas, tuple) else self.num_replicas


class ServeArgs(ModelArgs):
    """The Serve application: what `serve run serve.chat:app KEY=VALUE` and the `args` of a Serve YAML take.

    Either `model`, or `models`; with `models` the keys of one model that stand beside it hold for all of them.
    """

    models: list[ModelArgs] = []
    """Several models behind one address, each with its own engine."""
    gateway: Literal["auto", "always", "never"] = "auto"
    """A process of its own before the engines; `auto` starts it where requests must be told apart, spread, or counted
    together: several models, `routing: prefix`, `num_replicas: [min, max]`, or limits over several replicas."""
    api_key_file: Annotated[str, Field(min_length=1)] | None = None
    """File whose first line is the key that clients must send as a bearer token, on every route but health, or a YAML
    list of several keys with their limits; without it the key is that in the variable VLLM_API_KEY, if set."""
    limits: LimitsSection = LimitsSection()
    """Queue, rates, sizes and times of requests."""
    access_log: bool = True
    """Write one JSON line per request, without prompts, to a file beside the replica's log."""
    log_prompts: bool = False
    """Put request bodies into the access log."""

    @model_validator(mode="after")
    def there_is_one_model_or_a_list_of_them(self) -> Self:
        if not self.model and not self.models:
            raise ValueError("model is missing. Set it in the file or as model=…")
        if self.model and self.models:
            raise ValueError("model and models exclude each other: list the model under models as well")
        if self.models and (self.name or self.aliases):
            raise ValueError("name and aliases belong to one model: set them in the entries of models")
        for index, entry in enumerate(self.models):
            if not entry.model:
                raise ValueError(f"models.{index}.model is missing")
        return self

    @model_validator(mode="after")
    def prompts_are_logged_in_the_access_log(self) -> Self:
        if self.log_prompts and not self.access_log:
            raise ValueError("log_prompts writes into the access log, which access_log=false switches off")
        return self


class ServeConfig(ServeArgs):
    """Everything `raylm serve` and `raylm.serve` need: the application, the address, and the cluster."""

    host: str = Field("127.0.0.1", min_length=1)
    """Address to listen on. Anything but loopback should have an API key."""
    port: int = Field(8000, ge=1, le=65535)
    """Port to listen on."""
    proxy: Literal["auto", "haproxy", "python"] = "auto"
    """What listens on the port: HAProxy straight to the replicas, or Ray Serve's Python proxy; `auto` takes HAProxy
    where its binary is installed and it can reach the replicas (one node, or `host` is not loopback)."""
    chat_page: bool = False
    """A chat page in the browser at /chat of the same address; needs `pip install raylm[chat]`."""
    tls_cert_file: Annotated[str, Field(min_length=1)] | None = None
    """Certificate chain (PEM) to serve HTTPS with, by the Python proxy; HAProxy as Ray runs it has no TLS."""
    tls_key_file: Annotated[str, Field(min_length=1)] | None = None
    """Private key (PEM, without passphrase) of the certificate."""
    cluster_address: str | None = None
    """Address of a running cluster; without it as in `cluster.address` of training."""
    start_timeout_s: float = Field(600.0, gt=0)
    """Seconds the server may take until it answers."""

    @model_validator(mode="after")
    def certificate_and_key_come_together(self) -> Self:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_cert_file and tls_key_file belong together: set both")
        return self

    @model_validator(mode="after")
    def haproxy_has_no_tls(self) -> Self:
        if self.tls_cert_file is not None and self.proxy == "haproxy":
            raise ValueError("proxy=haproxy cannot serve HTTPS, Ray's HAProxy has no TLS: set proxy=python")
        return self


class ChatPageArgs(Section):
    """The chat page as a Serve application of its own: the `args` of its entry in a Serve YAML."""

    base_url: str = Field("http://127.0.0.1:8000", pattern=r"^https?://[^/?#]+(/[^?#]*)?$")
    """Where the page's process reaches the OpenAI routes, without /v1: Serve's own address, on loopback."""
    title: str = Field("raylm", min_length=1, max_length=80)
    """Heading of the page and of its browser tab."""
