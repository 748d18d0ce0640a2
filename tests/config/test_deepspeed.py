"""A user's own DeepSpeed JSON: filled, passed on, or refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from raylm.config import TrainConfig, load_config
from raylm.config.deepspeed import deepspeed_config
from raylm.errors import ConfigError

BASE = {"model": {"path": "model"}, "data": {"train": "data.json"}, "training.strategy": "deepspeed"}
FROM_ANOTHER_TRAINER = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 1.0,
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": False, "loss_scale": 0},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "weight_decay": 0.0}},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "none", "pin_memory": True},
        "overlap_comm": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": 1000,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "wall_clock_breakdown": True,
}


def _built(own: Any, *overrides: str) -> dict[str, Any]:
    settings = ["training.micro_batch_size=2", "cluster.num_workers=2", *overrides]
    config = load_config(TrainConfig, {**BASE, "deepspeed.config": own}, settings)
    return deepspeed_config(config, hidden_size=4096)


def test_values_that_are_auto_come_from_raylm_and_others_are_passed_on(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(FROM_ANOTHER_TRAINER))
    built = _built(str(path))
    assert built == _built(FROM_ANOTHER_TRAINER)
    assert built == {
        "steps_per_print": None,
        "wall_clock_breakdown": True,
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 4096**2,
            "stage3_prefetch_bucket_size": 1000,
            "stage3_param_persistence_threshold": 40960,
            "overlap_comm": True,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def test_offloading_keeps_what_the_json_says_of_it() -> None:
    own = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": False}}}
    zero = _built(own, "deepspeed.offload_optimizer=true", "deepspeed.offload_param=true")["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert zero["offload_param"] == {"device": "cpu"}


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"train_batch_size": 64}, "train_batch_size=64 contradicts training.global_batch_size=8"),
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps=3 contradicts"),
        ({"gradient_clipping": 0.5}, "gradient_clipping=0.5 contradicts optimizer.max_grad_norm=1.0"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage=2 contradicts deepspeed.stage=3"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type=Lamb contradicts optimizer.name=adamw"),
        ({"optimizer": {"params": {"lr": 1.0}}}, "optimizer.params.lr=1.0 contradicts optimizer.learning_rate=2e-05"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler is set by raylm's section schedule"),
        ({"bf16": {"enabled": True}}, "bf16.enabled does not go with raylm's precision"),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "/disk"}}},
            "device=nvme: offloading to disk is not supported. Set it to cpu, and deepspeed.offload_param=true.",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer.device=cpu contradicts deepspeed.offload_optimizer=none",
        ),
        (
            {"zero_optimization": {"zero_quantized_weights": True}},
            "zero_quantized_weights is not supported. Remove it.",
        ),
        ({"curriculum_learning": {"enabled": True}}, "curriculum_learning is not supported. Remove it."),
        ({"zero_optimization": 3}, "zero_optimization is not an object"),
        ("no-such.json", "no-such.json cannot be read as JSON"),
    ],
)
def test_what_contradicts_or_is_not_supported_is_named(own: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _built(own)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.strategy=ddp", "section deepspeed excludes training.strategy=ddp"),
        ("deepspeed.stage=2", "offload_param=true excludes stage=2"),
        ("deepspeed.stage=4", "deepspeed.stage=4 is not valid"),
    ],
)
def test_settings_that_exclude_each_other(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(TrainConfig, {**BASE, "deepspeed.offload_param": True}, [override])
    assert message in str(caught.value)
