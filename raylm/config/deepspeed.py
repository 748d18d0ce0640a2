"""The configuration DeepSpeed is given: raylm's settings, and what a user's own JSON says besides.

A setting has one place. What raylm sets elsewhere may stand in the JSON as `auto` or with the same value, so that files
made for other trainers can be used; a value that differs is an error. Keys that are passed on as they are stand in a
list, because others would change what a step computes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raylm.config.tree import TrainConfig
from raylm.errors import ConfigError

AUTO = "auto"
PASSED_ON = {
    "zero_optimization": {
        "allgather_bucket_size",
        "allgather_partitions",
        "contiguous_gradients",
        "log_trace_cache_warnings",
        "overlap_comm",
        "reduce_bucket_size",
        "reduce_scatter",
        "round_robin_gradients",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_module_granularity_threshold",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "sub_group_size",
    },
    "": {"comms_logger", "dump_state", "flops_profiler", "memory_breakdown", "steps_per_print", "wall_clock_breakdown"},
}
"""Keys of a user's JSON that DeepSpeed gets unchanged, by section."""
WITHOUT_EFFECT = {
    "zero_optimization": {"stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save"},
    "": {"zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "$schema"},
}
"""Keys that do no harm: raylm writes checkpoints and exports itself, and sets the others."""


def deepspeed_config(config: TrainConfig, *, hidden_size: int, world_size: int | None = None) -> dict[str, Any]:
    """What `deepspeed.initialize` is given. hidden_size: of the model; it sizes the buckets. world_size: the ranks
    there are; all that the configuration allows by default.

    Raises ConfigError for a JSON that cannot be read, and for what in it contradicts or is not supported.
    """
    section = config.deepspeed_or_default
    own = _own(section.config)
    _check(own, config)
    accumulation = config.gradient_accumulation_steps(world_size)
    per_step = config.training.micro_batch_size * accumulation * (world_size or config.cluster.max_workers)
    zero: dict[str, Any] = {
        "stage": section.stage,
        # Small models would have a collective for every few tensors.
        "reduce_bucket_size": max(hidden_size**2, 5_000_000),
        "stage3_prefetch_bucket_size": hidden_size**2 * 9 // 10,
        "stage3_param_persistence_threshold": hidden_size * 10,
        **_passed_on(own, "zero_optimization"),
    }
    for name, wanted in (("offload_optimizer", section.offload_optimizer), ("offload_param", section.offload_param)):
        if wanted:
            given = own.get("zero_optimization", {}).get(name, {})
            zero[name] = {**{key: value for key, value in given.items() if value != AUTO}, "device": "cpu"}
    return {
        "steps_per_print": None,
        **_passed_on(own, ""),
        # Of use to DeepSpeed only in that the three must fit; raylm says where a step ends.
        "train_batch_size": per_step,
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def read_deepspeed_json(path: str) -> dict[str, Any]:
    """The content of a DeepSpeed JSON file. Raises ConfigError."""
    try:
        content = json.loads(Path(path).expanduser().read_text())
    except (OSError, ValueError) as error:
        raise ConfigError("deepspeed.config", f"{path} cannot be read as JSON: {error}.", "Check the path.") from None
    if not isinstance(content, dict):
        raise ConfigError("deepspeed.config", f"{path} is not a JSON object.")
    return content


def _own(given: str | dict[str, Any] | None) -> dict[str, Any]:
    return read_deepspeed_json(given) if isinstance(given, str) else given or {}


def _passed_on(own: Mapping[str, Any], section: str) -> dict[str, Any]:
    found = own.get(section, {}) if section else own
    return {key: value for key, value in found.items() if key in PASSED_ON[section] and value != AUTO}


def _check(own: Mapping[str, Any], config: TrainConfig) -> None:
    section, optimizer = config.deepspeed_or_default, config.optimizer
    zero = _section(own, "zero_optimization")
    settings = {
        "train_batch_size": ("training.global_batch_size", config.training.global_batch_size),
        "train_micro_batch_size_per_gpu": ("training.micro_batch_size", config.training.micro_batch_size),
        "gradient_accumulation_steps": (
            "training.global_batch_size / (training.micro_batch_size x cluster.num_workers)",
            config.gradient_accumulation_steps(),
        ),
        "gradient_clipping": ("optimizer.max_grad_norm", optimizer.max_grad_norm),
    }
    for key, (name, value) in settings.items():
        _same(key, own.get(key, AUTO), name, value)
    _same("zero_optimization.stage", zero.get("stage", AUTO), "deepspeed.stage", section.stage)
    for kind, wanted in (("offload_optimizer", section.offload_optimizer), ("offload_param", section.offload_param)):
        _check_offload(kind, _section(zero, kind), wanted)
    for precision in ("fp16", "bf16", "torch_autocast", "amp"):
        if _section(own, precision).get("enabled", False) not in (False, AUTO):
            raise ConfigError(
                "deepspeed.config",
                f"{precision}.enabled does not go with raylm's precision: autocast over fp32 weights.",
                "Set it to auto, and training.precision=bf16 or fp32.",
            )
    _check_optimizer(_section(own, "optimizer"), config)
    if own.get("scheduler"):
        raise ConfigError("deepspeed.config", "scheduler is set by raylm's section schedule.", "Remove it.")
    known = {*settings, "zero_optimization", "fp16", "bf16", "torch_autocast", "amp", "optimizer", "scheduler"}
    _refuse_others(own, known | PASSED_ON[""] | WITHOUT_EFFECT[""], "")
    known = {"stage", "offload_optimizer", "offload_param"}
    name = "zero_optimization"
    _refuse_others(zero, known | PASSED_ON[name] | WITHOUT_EFFECT[name], f"{name}.")


def _check_offload(kind: str, given: Mapping[str, Any], wanted: bool) -> None:
    device = given.get("device", AUTO)
    if device == "nvme":
        raise ConfigError(
            "deepspeed.config",
            f"zero_optimization.{kind}.device=nvme: offloading to disk is not supported.",
            f"Set it to cpu, and deepspeed.{kind}=true.",
        )
    if device != AUTO:
        _same(f"zero_optimization.{kind}.device", device, f"deepspeed.{kind}", "cpu" if wanted else "none")
    _refuse_others(given, {"device", "pin_memory", "buffer_count", "buffer_size", "nvme_path"}, f"{kind}.")


def _check_optimizer(given: Mapping[str, Any], config: TrainConfig) -> None:
    if not given:
        return
    section = config.optimizer
    kind = str(given.get("type", section.name))
    if kind.lower() != section.name:
        _same("optimizer.type", kind, "optimizer.name", section.name)
    values = {"lr": section.learning_rate, "weight_decay": section.weight_decay, **section.options}
    for key, value in _section(given, "params").items():
        if value != AUTO:
            ours = values.get(key)
            same = list(ours) == value if isinstance(ours, tuple) else ours == value
            name = {"lr": "learning_rate", "weight_decay": "weight_decay"}.get(key, f"options.{key}")
            if not same:
                _differs(f"optimizer.params.{key}", value, f"optimizer.{name}", ours)


def _section(given: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = given.get(name) or {}
    if not isinstance(value, Mapping):
        raise ConfigError("deepspeed.config", f"{name} is not an object.")
    return value


def _same(key: str, value: Any, name: str, ours: Any) -> None:
    if value not in (AUTO, ours):
        _differs(key, value, name, ours)


def _differs(key: str, value: Any, name: str, ours: Any) -> None:
    raise ConfigError(
        "deepspeed.config", f"{key}={value} contradicts {name}={ours}.", "Set one of them, the other to auto."
    )


def _refuse_others(given: Mapping[str, Any], known: set[str], prefix: str) -> None:
    for key in given:
        if key not in known:
            raise ConfigError("deepspeed.config", f"{prefix}{key} is not supported.", "Remove it.")
