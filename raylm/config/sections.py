"""The sections that training shares with everything else: the run, the model, the cluster."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from raylm.config.base import Section

Attention = Literal["auto", "segments", "sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3"]


class RunSection(Section):
    """Where a run writes, and the seed that its order, dropout and initialisation come from."""

    dir: str = Field("runs/train", min_length=1)
    """Folder that everything the run produces lies under. On a cluster all nodes must see it."""
    storage_path: str | None = None
    """Absolute folder that a relative `run.dir` is resolved against; without it, the current folder."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the data order, of dropout and of new weights."""
    overwrite: bool = False
    """Delete a former run in `run.dir` first. Folders that hold no raylm run are never deleted."""


class RopeSection(Section):
    """Position interpolation: a context `factor` times longer than the model was trained on (docs/long-context.md)."""

    type: Literal["linear", "ntk", "dynamic", "yarn", "llama3"]
    """`linear` (arXiv:2306.15595), `ntk`, `dynamic` and `yarn` (arXiv:2309.00071), `llama3` (Llama 3.1)."""
    factor: float = Field(gt=1)
    """How many times longer."""
    original_max_position_embeddings: Annotated[int, Field(ge=1)] | None = None
    """Tokens the model was trained on; default: what its configuration says."""
    beta_fast: float = Field(32.0, gt=0)
    """yarn: dimensions that turn more often than this over the original context stay as they are."""
    beta_slow: float = Field(1.0, gt=0)
    """yarn: dimensions that turn less often than this are interpolated by the whole factor."""
    low_freq_factor: float = Field(1.0, gt=0)
    """llama3: wavelengths above the original context divided by this are interpolated by the whole factor."""
    high_freq_factor: float = Field(4.0, gt=0)
    """llama3: wavelengths below the original context divided by this stay as they are."""


class ModelSection(Section):
    """The base model."""

    path: str = Field(min_length=1)
    """Hub id, folder, or GGUF file; `pkg://PACKAGE/FILE` names a file that an installed Python package ships."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run the Python code that a model repository ships. Off unless you trust its author."""
    rope: RopeSection | None = None
    """Position interpolation. Without it the model's own scaling is kept."""
    attention: Attention = "auto"
    """How packed sequences attend: `auto` takes flash_attention_3 or 2 on a GPU where the package is installed, else
    `flex_attention` there; `segments` (SDPA one sequence at a time) on CPUs and for models without it. `sdpa` and
    `eager` use a block-diagonal mask. The log says which it is."""
    kernels: Literal["torch", "liger"] = "torch"
    """`liger`: norms, rotations and gated MLPs by Liger's fused kernels, on GPUs, for the architectures it knows. Needs
    the package liger-kernel."""


class ClusterSection(Section):
    """What the run asks of Ray."""

    address: str | None = None
    """Address of a running cluster. Without it: the cluster that RAY_ADDRESS names or that this job runs on, else
    a local one for the length of the call."""
    num_workers: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = 1
    """Training workers (ranks). `[min, max]` is elastic: as many as the cluster has room for; a lost one shrinks the
    group, returning room lets it grow."""
    resize_interval_s: float = Field(60.0, ge=0)
    """How often an elastic run looks for room for more workers, at most."""
    cpus_per_worker: Annotated[int, Field(ge=1)] | None = None
    """CPUs of each worker, which are its threads on a machine without GPU. Default: the cluster's CPUs divided by
    the workers without GPU, 1 with."""
    use_gpu: bool | Literal["auto"] = "auto"
    """Give each worker one GPU; `auto` does where the cluster has enough."""
    max_failures: int = Field(3, ge=0)
    """Times a run restarts from its newest checkpoint after losing a worker."""
    stuck_timeout_s: float = Field(1800.0, gt=0)
    """Seconds without a sign of life from a rank (a micro-batch, a part of an evaluation) after which the workers
    restart. Give it more than the longest of those takes, and than loading the model."""

    @model_validator(mode="after")
    def fewest_workers_come_first(self) -> Self:
        if self.min_workers > self.max_workers:
            raise ValueError(f"num_workers=[{self.min_workers}, {self.max_workers}] must be [min, max]")
        return self

    @property
    def min_workers(self) -> int:
        """The fewest workers to train with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """The most workers to train with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change."""
        return not isinstance(self.num_workers, int)
