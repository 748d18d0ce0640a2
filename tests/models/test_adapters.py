"""Kinds of LoRA: what they train, and that adapter, merged model and live model agree."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from raylm.config.sections import ModelSection
from raylm.config.training import LoraSection
from raylm.data.tokenizer import load_tokenizer
from raylm.errors import ModelError
from raylm.models.adapters import add_lora, merged
from raylm.models.export import export_adapter
from raylm.models.load import load_model
from raylm.training.batch import batch_of
from raylm.training.loop import train_step
from raylm.training.module import LossModule
from raylm.training.strategies.single import SingleStrategy
from tests.tiny import build_tiny_model


@pytest.fixture(scope="module")
def untied_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("untied") / "untied", tie_word_embeddings=False)


def _load(folder: Path) -> Any:
    return load_model(ModelSection(path=str(folder)), torch.device("cpu"))


def _trained(folder: Path, section: LoraSection) -> Any:
    """After three steps, of which dropout takes no part."""
    import numpy as np

    from raylm.config.training import OptimizerSection
    from raylm.optim.build import build_optimizer

    module = LossModule(add_lora(_load(folder), section, seed=0))
    optimizer = OptimizerSection(learning_rate=1e-2)
    strategy = SingleStrategy(module, lambda named: build_optimizer(named, optimizer), torch.device("cpu"))
    for step in range(3):
        ids = np.random.default_rng(step).integers(3, 200, 20).astype(np.int32)
        train_step(strategy, [batch_of([ids], [np.ones(20, bool)])], max_grad_norm=1.0, precision="fp32", step=step)
    return module.model.eval()


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=torch.tensor([[5, 9, 17, 33, 65, 129]])).logits


@pytest.mark.parametrize(
    "section",
    [
        LoraSection(rank=4),
        LoraSection(rank=4, use_rslora=True),
        LoraSection(rank=4, use_dora=True),
        LoraSection(rank=4, rank_pattern={"mlp.down_proj": 8}, alpha_pattern={"q_proj": 3}),
        LoraSection(rank=4, target_modules=("q_proj", "v_proj"), modules_to_save=("norm",)),
    ],
    ids=["plain", "rslora", "dora", "patterns", "modules_to_save"],
)
def test_adapter_merged_model_and_live_model_agree(tiny_model_dir: Path, tmp_path: Path, section: LoraSection) -> None:
    from peft import PeftModel

    model = _trained(tiny_model_dir, section)
    live = _logits(model)
    assert not torch.allclose(live, _logits(_load(tiny_model_dir)), atol=1e-3)
    export_adapter(model, load_tokenizer(str(tiny_model_dir)), tmp_path / "adapter")
    again = PeftModel.from_pretrained(_load(tiny_model_dir), tmp_path / "adapter")
    torch.testing.assert_close(_logits(again), live, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(_logits(merged(model)), live, rtol=1e-4, atol=1e-4)


def test_scaling_and_ranks_are_as_asked(tiny_model_dir: Path) -> None:
    section = LoraSection(rank=4, alpha=8, use_rslora=True, rank_pattern={"down_proj": 16}, alpha_pattern={"q_proj": 2})
    found = {name: module for name, module in add_lora(_load(tiny_model_dir), section, seed=0).named_modules()}
    layers = {name.rsplit(".", 1)[-1]: module for name, module in found.items() if hasattr(module, "scaling")}
    assert layers["k_proj"].scaling["default"] == pytest.approx(8 / math.sqrt(4))
    assert layers["q_proj"].scaling["default"] == pytest.approx(2 / math.sqrt(4))
    assert layers["down_proj"].scaling["default"] == pytest.approx(8 / math.sqrt(16))
    assert layers["down_proj"].lora_A["default"].weight.shape[0] == 16


def test_a_whole_output_layer_beside_adapters_learns(untied_model_dir: Path) -> None:
    """The loss reads the output layer's weight by itself: it must be the copy that is trained."""
    model = _trained(untied_model_dir, LoraSection(rank=4, modules_to_save=("lm_head",)))
    trained, base = merged(model).lm_head.weight, _load(untied_model_dir).lm_head.weight
    assert not torch.equal(trained, base)


def test_names_that_match_nothing_or_a_tied_matrix_are_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(ModelError, match=r"lora.rank_pattern: w_pack matches no linear module"):
        add_lora(_load(tiny_model_dir), LoraSection(rank_pattern={"w_pack": 3}), seed=0)
    with pytest.raises(ModelError, match=r"lora.modules_to_save: nom matches no module"):
        add_lora(_load(tiny_model_dir), LoraSection(modules_to_save=("nom",)), seed=0)
    for name in ("lm_head", "embed_tokens"):
        with pytest.raises(ModelError, match="is tied"):
            add_lora(_load(tiny_model_dir), LoraSection(modules_to_save=(name,)), seed=0)
