"""The configuration tree of a training run, and the rules that reach across sections."""

from typing import Self

from pydantic import model_validator

from raylm.config.base import Section
from raylm.config.data import DataSection
from raylm.config.methods import METHODS, STRATEGIES, MethodRow
from raylm.config.metrics import MetricsSection
from raylm.config.sections import ClusterSection, ModelSection, RunSection
from raylm.config.training import (
    CheckpointSection,
    DeepspeedSection,
    ExportSection,
    FsdpSection,
    LisaSection,
    LoraSection,
    LossSection,
    OptimizerSection,
    ScheduleSection,
    TrainingSection,
)
from raylm.words import counted


class TrainConfig(Section):
    """Everything `raylm train` needs; one tree for the CLI, the SDK and jobs."""

    model: ModelSection
    data: DataSection
    run: RunSection = RunSection()
    training: TrainingSection = TrainingSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    loss: LossSection = LossSection()
    lora: LoraSection | None = None
    lisa: LisaSection | None = None
    fsdp: FsdpSection | None = None
    deepspeed: DeepspeedSection | None = None
    checkpoint: CheckpointSection = CheckpointSection()
    export: ExportSection = ExportSection()
    metrics: MetricsSection = MetricsSection()
    cluster: ClusterSection = ClusterSection()

    @model_validator(mode="after")
    def strategy_fits_the_number_of_workers(self) -> Self:
        if self.training.strategy == "single" and self.cluster.max_workers > 1:
            raise ValueError(
                f"training.strategy=single excludes cluster.num_workers={self.cluster.max_workers}. "
                "Set training.strategy=ddp, or one worker"
            )
        return self

    @model_validator(mode="after")
    def every_rank_has_micro_batches(self) -> Self:
        micro, workers = self.training.micro_batch_size, self.cluster.max_workers
        if self.cluster.is_elastic and self.micro_batches_per_step < workers:
            raise ValueError(
                f"training.global_batch_size={self.training.global_batch_size} is "
                f"{counted(self.micro_batches_per_step, 'micro-batch')}, fewer than the {workers} workers of "
                "cluster.num_workers"
            )
        if not self.cluster.is_elastic and self.training.global_batch_size % (micro * workers):
            raise ValueError(
                f"training.global_batch_size={self.training.global_batch_size} must be a multiple of "
                f"training.micro_batch_size x cluster.num_workers = {micro * workers}"
            )
        return self

    @model_validator(mode="after")
    def dynamic_positions_exclude_rows_of_several_sequences(self) -> Self:
        rope = self.model.rope
        several = self.data.packing or self.training.micro_batch_size > 1
        if rope is not None and rope.type == "dynamic" and several:
            raise ValueError(
                "model.rope.type=dynamic excludes data.packing and training.micro_batch_size above 1: its frequencies "
                "follow the longest sequence of a batch. Set data.packing=false and micro_batch_size=1, or use yarn"
            )
        return self

    @model_validator(mode="after")
    def settings_of_a_method_go_with_it(self) -> Self:
        for section in ("lora", "lisa"):
            users = [name for name, row in METHODS.items() if row.section == section]
            if getattr(self, section) is not None and self.training.method not in users:
                raise ValueError(
                    f"section {section} excludes training.method={self.training.method}. "
                    f"Set training.method={' or '.join(users)}, or drop it: {section}=null"
                )
        return self

    @model_validator(mode="after")
    def strategy_runs_the_method(self) -> Self:
        excluded = self.method.excluded
        if self.strategy in excluded:
            others = [name for name in STRATEGIES if name not in excluded]
            raise ValueError(
                f"training.method={self.training.method} excludes training.strategy={self.strategy}: "
                f"{excluded[self.strategy]}. It runs on {', '.join(others)}"
            )
        return self

    @model_validator(mode="after")
    def what_can_be_frozen_would_be_trained(self) -> Self:
        if self.training.freeze and not self.method.freezes:
            able = " or ".join(name for name, row in METHODS.items() if row.freezes)
            raise ValueError(
                f"training.freeze excludes training.method={self.training.method}, which trains none of those. "
                f"Set training.method={able}, or drop it"
            )
        return self

    @model_validator(mode="after")
    def fp16_has_a_gpu_and_loss_scaling(self) -> Self:
        if self.training.precision == "fp16":
            if self.cluster.use_gpu is False:
                raise ValueError("training.precision=fp16 excludes cluster.use_gpu=false. Set training.precision=auto")
            if self.strategy == "deepspeed":
                raise ValueError(
                    "training.precision=fp16 excludes training.strategy=deepspeed, which has loss scaling of its own. "
                    "Set training.precision=bf16 or fp32, or training.strategy=fsdp"
                )
        return self

    @model_validator(mode="after")
    def averages_exclude_what_keeps_state_elsewhere(self) -> Self:
        if self.training.ema_decay is not None:
            if self.training.method == "lisa":
                raise ValueError(
                    "training.ema_decay excludes training.method=lisa, which frees the state of blocks that rest. "
                    "Drop one"
                )
            if self.strategy == "deepspeed":
                raise ValueError(
                    "training.ema_decay excludes training.strategy=deepspeed, which keeps the weights in flat pieces. "
                    "Set training.strategy=fsdp, or drop it"
                )
        return self

    @model_validator(mode="after")
    def compiled_blocks_exclude_what_cannot_be_compiled(self) -> Self:
        if self.training.compile and self.strategy == "deepspeed":
            raise ValueError(
                "training.compile=true excludes training.strategy=deepspeed, which gathers weights within a block. "
                "Set training.strategy=fsdp, or drop it"
            )
        if self.training.compile and self.method.quantized:
            raise ValueError(
                f"training.compile=true excludes training.method={self.training.method}: the 4-bit products are not "
                "traced. Set training.method=lora, or drop it"
            )
        return self

    @model_validator(mode="after")
    def fsdp_settings_go_with_the_fsdp_strategy(self) -> Self:
        if self.fsdp is not None and self.training.strategy != "fsdp":
            raise ValueError(
                f"section fsdp excludes training.strategy={self.training.strategy}. "
                "Set training.strategy=fsdp, or drop it: fsdp=null"
            )
        return self

    @model_validator(mode="after")
    def deepspeed_settings_go_with_the_deepspeed_strategy(self) -> Self:
        if self.deepspeed is not None and self.training.strategy != "deepspeed":
            raise ValueError(
                f"section deepspeed excludes training.strategy={self.training.strategy}. "
                "Set training.strategy=deepspeed, or drop deepspeed"
            )
        return self

    @model_validator(mode="after")
    def evaluation_interval_needs_evaluation_data(self) -> Self:
        if self.training.eval_interval_steps and not self.data.eval:
            raise ValueError("training.eval_interval_steps needs data.eval. Name an evaluation file, or drop it")
        return self

    @model_validator(mode="after")
    def overwriting_excludes_resuming(self) -> Self:
        if self.run.overwrite and self.training.resume:
            raise ValueError("run.overwrite=true excludes training.resume, which needs the former run. Drop one")
        return self

    @property
    def method(self) -> MethodRow:
        """What there is to know about `training.method`."""
        return METHODS[self.training.method]

    @property
    def lora_or_default(self) -> LoraSection:
        """The LoRA settings in force when `training.method` is `lora` or `qlora`."""
        return self.lora or LoraSection()

    @property
    def lisa_or_default(self) -> LisaSection:
        """The LISA settings in force when `training.method` is `lisa`."""
        return self.lisa or LisaSection()

    @property
    def fsdp_or_default(self) -> FsdpSection:
        """The sharding settings in force when `training.strategy` is `fsdp`."""
        return self.fsdp or FsdpSection()

    @property
    def deepspeed_or_default(self) -> DeepspeedSection:
        """The ZeRO settings in force when `training.strategy` is `deepspeed`."""
        return self.deepspeed or DeepspeedSection()

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches of a global batch, over all ranks."""
        return self.training.global_batch_size // self.training.micro_batch_size

    def gradient_accumulation_steps(self, world_size: int | None = None) -> int:
        """Micro-batches per rank and step with so many ranks, by default all that `cluster.num_workers` allows."""
        return -(-self.micro_batches_per_step // (world_size or self.cluster.max_workers))

    @property
    def strategy(self) -> str:
        """Name of the strategy with `auto` resolved."""
        if self.training.strategy != "auto":
            return self.training.strategy
        return "single" if self.cluster.max_workers == 1 else "ddp"
