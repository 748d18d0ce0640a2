"""The sections that say how weights are changed: training, optimizer, schedule, LoRA, checkpoints, export."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from raylm.config.base import Section

Precision = Literal["auto", "bf16", "fp16", "fp32"]
ExportDtype = Literal["auto", "bf16", "fp16", "fp32"]


class TrainingSection(Section):
    """The step and how often it is taken."""

    method: Literal["full", "lora", "qlora", "lisa", "new_rows"] = "full"
    """`full` changes all weights, `lora` trains low-rank adapters (section `lora`), `qlora` the same over decoder
    blocks in 4 bits, `lisa` a few decoder blocks at a time (section `lisa`), `new_rows` only the rows of embedding and
    output layer that `raylm vocab extend` added."""
    strategy: Literal["auto", "single", "ddp", "fsdp", "deepspeed"] = "auto"
    """How ranks share the work; `auto` is `single` for one worker and `ddp` for more. `fsdp` and `deepspeed` give each
    rank a part of the weights, gradients and optimizer state (sections `fsdp` and `deepspeed`)."""
    num_epochs: int = Field(1, ge=1)
    """Passes over the data; `max_steps` can end the run earlier."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps at most."""
    global_batch_size: int = Field(8, ge=1)
    """Packed rows per optimizer step, over all ranks and accumulation steps."""
    micro_batch_size: int = Field(1, ge=1)
    """Packed rows per rank and forward."""
    precision: Precision = "auto"
    """`bf16` is autocast over fp32 master weights; `fp16` the same with dynamic loss scaling, on GPUs; `auto` is bf16
    where the processor multiplies it natively (GPUs of 2020 and later, CPUs with AMX or AVX512-BF16), else fp16 on
    other GPUs (fp32 with `deepspeed`) and fp32 on other CPUs."""
    gradient_checkpointing: bool | Annotated[int, Field(ge=1)] = False
    """Recompute activations in the backward pass: less memory, about a third more time. A number n does it in every
    n-th decoder block only, from the first on."""
    freeze: tuple[str, ...] = ()
    """Parameters that stay as they are, by patterns of their names, such as `embed_tokens` or `layers.0.`; `*` stands
    for any text. A pattern that no name holds is an error. For `full` and `lisa`."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Average the weights over steps, such as 0.999: evaluation and export use the average. Not with `lisa` or
    `deepspeed`."""
    compile: bool = False
    """Compile each decoder block (torch.compile, inductor): steps are faster after a first one of minutes. On CPUs it
    needs a C++ compiler. Not with `deepspeed` or `qlora`."""
    resume: str | None = None
    """`auto` continues from the newest complete checkpoint of `run.dir`; a path names one."""
    eval_interval_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps between evaluations; without it only at the end. Needs `data.eval`."""
    early_stopping_patience: Annotated[int, Field(ge=1)] | None = None
    """Evaluations without a lower loss after which the run ends. Needs `training.eval_interval_steps`."""
    max_time_s: Annotated[float, Field(gt=0)] | None = None
    """Seconds after which the run ends with a checkpoint and an export; they count from the call, data included."""

    profile_steps: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    """First and last step to record with torch's profiler, such as `[3, 5]`: a Chrome trace of each rank in
    `run.dir`/profile. A step takes longer while it is recorded."""

    @model_validator(mode="after")
    def profiled_steps_are_in_order(self) -> Self:
        if self.profile_steps is not None and self.profile_steps[0] > self.profile_steps[1]:
            raise ValueError(f"profile_steps={list(self.profile_steps)} must be [first, last]")
        return self

    @model_validator(mode="after")
    def early_stopping_needs_evaluations(self) -> Self:
        if self.early_stopping_patience is not None and self.eval_interval_steps is None:
            raise ValueError("early_stopping_patience needs training.eval_interval_steps. Set it, or drop the patience")
        return self

    @model_validator(mode="after")
    def global_batch_is_a_multiple_of_micro_batch(self) -> Self:
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size ({self.global_batch_size}) must be a multiple of micro_batch_size "
                f"({self.micro_batch_size})"
            )
        return self


class OptimizerSection(Section):
    """The optimizer (`raylm/optim/table.py` lists the rows)."""

    name: str = "adamw"
    """Row of the optimizer table: `raylm optim list`."""
    learning_rate: float = Field(2e-5, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(0.0, ge=0)
    """Decay of matrices, decoupled or L2 as the row says; norms and biases never decay."""
    decay_embeddings: bool = True
    """Whether embeddings are matrices in this; an output layer that shares its weights with one goes with it."""
    max_grad_norm: float = Field(1.0, gt=0)
    """The gradient's global norm is clipped to this."""
    learning_rates: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Other peak rates for the parameters whose name holds a pattern, such as `{"embed_tokens": 1e-6}`; 0 freezes. `*`
    stands for any text. The first pattern that a name holds counts."""
    options: dict[str, float | bool | str | tuple[float, ...]] = {}
    """Further arguments of the optimizer, under its own names, such as `betas` or `eps`; `raylm optim list --json`
    has the defaults."""


class LossSection(Section):
    """What training adds to the next-token loss; evaluation never does."""

    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of each target that is spread evenly over the vocabulary (arXiv:1512.00567)."""
    z_loss: float = Field(0.0, ge=0)
    """Weight of the squared log-normaliser of the softmax, which keeps logits from drifting (arXiv:2204.02311)."""
    neftune_alpha: float = Field(0.0, ge=0)
    """Noise on the embeddings: uniform within alpha / sqrt(tokens of the sequence x hidden size) (arXiv:2310.05914)."""


class ScheduleSection(Section):
    """The learning rate over steps."""

    name: Literal["constant", "linear", "cosine", "polynomial", "wsd", "inverse_sqrt", "one_cycle"] = "cosine"
    """Shape after the warm-up. `wsd` stays at the peak and falls linearly at the end; `inverse_sqrt` falls with
    sqrt(warmup_steps / step); `one_cycle` rises and falls along cosines."""
    warmup_steps: int = Field(0, ge=0)
    """Steps in which the rate rises linearly from 0. `inverse_sqrt` needs them; `one_cycle` has its rise instead."""
    min_ratio: float = Field(0.0, ge=0, le=1)
    """Share of the peak rate that the shape falls to by the end of the run; `inverse_sqrt` stops falling there."""
    power: float = Field(1.0, gt=0)
    """Exponent of `polynomial`."""
    decay_share: float = Field(0.1, gt=0, le=1)
    """Share of the steps after the warm-up in which `wsd` falls."""
    rise_share: float = Field(0.3, gt=0, lt=1)
    """Share of the steps in which `one_cycle` rises."""
    start_ratio: float = Field(0.04, ge=0, le=1)
    """Share of the peak rate that `one_cycle` begins with."""

    @model_validator(mode="after")
    def warm_up_fits_the_shape(self) -> Self:
        if self.name == "inverse_sqrt" and not self.warmup_steps:
            raise ValueError("name=inverse_sqrt takes its time scale from warmup_steps. Set schedule.warmup_steps")
        if self.name == "one_cycle" and self.warmup_steps:
            raise ValueError("name=one_cycle excludes warmup_steps. Set schedule.rise_share, or choose another name")
        return self


class LoraSection(Section):
    """Low-rank adapters (arXiv:2106.09685), through PEFT. Used when `training.method` is `lora` or `qlora`."""

    rank: int = Field(16, ge=1)
    """Rank of the update."""
    alpha: float = Field(32.0, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the linear modules to adapt; `all-linear` is all but the output layer."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rank-stabilised, arXiv:2312.03732)."""
    use_dora: bool = False
    """Learn the lengths of the weights' columns apart from their directions (arXiv:2402.09353)."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = {}
    """Other ranks for modules whose name a pattern matches at its end, such as `{"mlp.down_proj": 32}`."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Other alphas in the same way."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained and saved whole beside the adapters, such as `norm`."""
    new_rows: bool = True
    """Train and save the rows that `raylm vocab extend` added as well, where the model has such. Off, tokens that are
    new are never learnt."""


class LisaSection(Section):
    """Layerwise importance sampled training (arXiv:2403.17919). Used when `training.method` is `lisa`."""

    num_active_layers: int = Field(2, ge=1)
    """Decoder blocks trained at a time."""
    interval_steps: int = Field(20, ge=1)
    """Optimizer steps after which other blocks are drawn."""
    layer_weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    """How likely each block is to be drawn, relative to the others; all alike where it is not given."""
    always_active: tuple[Literal["embeddings", "head", "final_norm"], ...] = ("embeddings", "head", "final_norm")
    """What is trained in every interval besides the blocks; a tied embedding and head are one matrix."""
    keep_state: bool = False
    """Park the optimizer state of blocks that are frozen in host memory until their next turn. Off, it is freed."""

    @model_validator(mode="after")
    def enough_layers_can_be_drawn(self) -> Self:
        if self.layer_weights is not None:
            likely = sum(weight > 0 for weight in self.layer_weights)
            if likely < self.num_active_layers:
                raise ValueError(
                    f"layer_weights has {likely} values above 0, fewer than num_active_layers={self.num_active_layers}"
                )
        return self


class FsdpSection(Section):
    """Sharding by torch FSDP2. Used when `training.strategy` is `fsdp`."""

    reshard_after_forward: bool = True
    """Give up the gathered weights of a block after its forward and gather them again for the backward pass. Off, they
    stay: less traffic, more memory (ZeRO-2)."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimizer state in host memory; the GPU holds what is being computed."""


class DeepspeedSection(Section):
    """ZeRO (arXiv:1910.02054), by DeepSpeed. Used when `training.strategy` is `deepspeed`."""

    stage: int = Field(3, ge=0, le=3)
    """What each rank holds a part of: nothing (0), optimizer state (1), gradients too (2), weights too (3)."""
    offload_optimizer: bool = False
    """Keep optimizer state in host memory and step there (stages 1 to 3)."""
    offload_param: bool = False
    """Keep the parts of weights in host memory (stage 3)."""
    config: str | dict[str, Any] | None = None
    """A DeepSpeed configuration of your own: path of a JSON file, or its content. Values `auto` are filled in; what
    contradicts raylm's settings is refused."""

    @model_validator(mode="after")
    def offloading_needs_parts(self) -> Self:
        if self.offload_param and self.stage != 3:
            raise ValueError(f"offload_param=true excludes stage={self.stage}. Set deepspeed.stage=3, or drop it")
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("offload_optimizer=true excludes stage=0. Set deepspeed.stage=1 or more, or drop it")
        return self


class CheckpointSection(Section):
    """What is saved for resuming, and for how long."""

    interval_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps between checkpoints; without it only one at the end."""
    keep_last: int = Field(2, ge=1)
    """Newest checkpoints kept."""
    keep_best: bool = True
    """Keep the checkpoint with the lowest evaluation loss as well."""
    asynchronous: bool = True
    """Write beside the training, from a copy in host memory: as much of it as this rank's state takes."""
    mirror: str | None = None
    """Folder or address (`s3://bucket/runs/a`) that each checkpoint is copied to as well. `training.resume=auto` goes
    on from there where `run.dir` has none, and `training.resume` takes the address of one."""


class ExportSection(Section):
    """The model folder a run ends with."""

    enabled: bool = True
    """Write `run.dir`/export when training ends."""
    dtype: ExportDtype = "auto"
    """Storage type of the weights; `auto` is that of the base model's configuration, bf16 where it names none."""
