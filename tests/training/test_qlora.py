"""QLoRA: the steps of LoRA over the weights that NF4 leaves, exported onto the ones it was made of."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from raylm.config.sections import ModelSection
from raylm.data.tokenizer import load_tokenizer
from raylm.errors import ConfigError
from raylm.merging import run_merge
from raylm.models.blocks import decoder_blocks
from raylm.models.load import load_model
from raylm.models.quantize import load_quantized
from raylm.training.checkpoint import newest_checkpoint
from tests.training.support import Rows, make_config, read_checkpoint, run_in_process

ROWS = Rows()
CPU = torch.device("cpu")


def test_the_run_is_that_of_lora_over_dequantised_weights(tiny_model_dir: Path, tmp_path: Path) -> None:
    section = ModelSection(path=str(tiny_model_dir))
    plain, quantized = load_model(section, CPU), load_quantized(section, CPU, compute_dtype=torch.float32)
    with torch.no_grad():
        for own, other in zip(decoder_blocks(plain).modules(), decoder_blocks(quantized).modules(), strict=True):
            if isinstance(own, torch.nn.Linear):
                own.weight.copy_(other(torch.eye(own.in_features)).t())
    plain.save_pretrained(tmp_path / "dequantised")
    load_tokenizer(str(tiny_model_dir)).save_pretrained(tmp_path / "dequantised")
    curves = []
    for number, (model, method) in enumerate(
        [(tiny_model_dir, "qlora"), (tmp_path / "dequantised", "lora"), (tiny_model_dir, "lora")]
    ):
        config = make_config(model, tmp_path / str(number), f"training.method={method}", "lora.rank=4")
        curves.append([(line["train/loss"], line["train/grad_norm"]) for line in run_in_process(config, ROWS)])
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-5)
    assert np.abs(np.subtract(curves[0], curves[2])).max() > 3e-3, "not the plain weights"


def test_adapter_and_export_are_on_the_base_as_it_is_stored(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A05."""
    settings = ["training.method=qlora", "lora.rank=4", "lora.alpha=8", "export.enabled=true", "export.dtype=fp32"]
    run_in_process(make_config(tiny_model_dir, tmp_path, *settings), ROWS)
    newest = newest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    state, exported = read_checkpoint(newest), load_file(tmp_path / "export" / "model.safetensors")
    base = load_model(ModelSection(path=str(tiny_model_dir)), CPU)
    for name, weight in exported.items():
        expected = base.get_parameter(name)
        path = f"model/base_model.model.{name.removesuffix('.weight')}"
        if f"{path}.lora_A.default.weight" in state:
            update = state[f"{path}.lora_B.default.weight"] @ state[f"{path}.lora_A.default.weight"] * (8 / 4)
            assert update.abs().max() > 1e-3
            expected = expected + update
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-6)
    assert "quantization_config" not in json.loads((tmp_path / "export" / "config.json").read_text())
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(tiny_model_dir)
    assert all("lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    run_merge(tmp_path / "adapter", tmp_path / "merged", None)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.allclose(merged[name], weight, atol=1e-6) for name, weight in exported.items())


def test_dora_and_gradient_checkpointing_go_with_it(tiny_model_dir: Path, tmp_path: Path) -> None:
    settings = ["training.method=qlora", "lora.use_dora=true", "training.gradient_checkpointing=true"]
    lines = run_in_process(make_config(tiny_model_dir, tmp_path, *settings), ROWS)
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]


def test_a_strategy_that_cannot_run_it_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training.method=qlora excludes .*deepspeed.* on single, ddp, fsdp"):
        make_config(tiny_model_dir, tmp_path, "training.method=qlora", "training.strategy=deepspeed")
