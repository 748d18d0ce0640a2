"""Liger's modules take the places of PyTorch's, and only where they can run. The kernels themselves need a GPU."""

import sys
from pathlib import Path

import pytest
import torch

from raylm.config.sections import ModelSection
from raylm.errors import ModelError
from raylm.models.blocks import decoder_blocks
from raylm.models.kernels import check_kernels, check_liger, use_liger
from raylm.models.load import load_model
from tests.tiny import build_tiny_model


def test_norms_and_mlps_are_replaced_and_the_loss_is_not(tmp_path: Path) -> None:
    model = load_model(ModelSection(path=str(build_tiny_model(tmp_path / "model"))), torch.device("cpu"))
    module = sys.modules[type(model).__module__]
    before, forward = model.state_dict(), model.forward
    with pytest.MonkeyPatch.context() as patch:
        for name in (
            "apply_rotary_pos_emb",
            "LlamaRMSNorm",
            "LlamaMLP",
        ):  # Liger's are put there for all of the process
            patch.setattr(module, name, getattr(module, name))
        rotation = module.apply_rotary_pos_emb
        use_liger(model)
        assert module.apply_rotary_pos_emb is not rotation
    for block in decoder_blocks(model):
        assert "liger" in block.mlp.forward.__func__.__module__
        assert "liger" in block.input_layernorm.forward.__func__.__module__
    assert model.forward == forward
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert before.keys() == after.keys()


def test_refusals() -> None:
    check_kernels("torch", on_gpu=False)
    check_kernels("liger", on_gpu=True)
    with pytest.raises(ModelError, match="needs a CUDA device"):
        check_kernels("liger", on_gpu=False)
    check_liger("llama")
    with pytest.raises(ModelError, match=r"nothing for the architecture gpt2, only for .*llama"):
        check_liger("gpt2")
