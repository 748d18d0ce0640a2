"""A draft out of a model's own blocks, and one of another width."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from raylm.errors import ModelError
from raylm.models.shrink import check_layers, evenly_spaced, narrower_config, new_model, take_layers

IDS = torch.tensor([[5, 9, 31, 7, 2, 8]])
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


def model(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, **settings)).eval()
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, **settings)).eval()


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [(30, 4, (0, 10, 19, 29)), (30, 2, (0, 29)), (30, 1, (0,)), (4, 4, (0, 1, 2, 3)), (2, 2, (0, 1))],
)
def test_layers_are_evenly_spaced_from_the_first_to_the_last(total: int, count: int, expected: tuple[int, ...]) -> None:
    assert evenly_spaced(total, count) == expected


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@torch.no_grad()
def test_the_draft_is_the_model_with_the_other_blocks_left_out(tmp_path: Path, kind: str, tied: bool) -> None:
    whole = model(kind, tie_word_embeddings=tied)
    draft = take_layers(whole, (0, 2, 4))
    kept = draft(IDS, use_cache=False).logits
    draft.save_pretrained(tmp_path)
    whole.model.layers = nn.ModuleList([whole.model.layers[place] for place in (0, 2, 4)])
    whole.config.num_hidden_layers = 3
    expected = whole(IDS, use_cache=False).logits
    torch.testing.assert_close(kept, expected)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(IDS).logits, expected)
    assert loaded.config.num_hidden_layers == 3


def test_settings_of_single_layers_follow_them() -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
    whole = model("qwen3", layer_types=kinds, sliding_window=4, use_sliding_window=True)
    assert take_layers(whole, (0, 1, 4)).config.layer_types == [kinds[0], kinds[1], kinds[4]]
    assert whole.config.layer_types == kinds


def test_layers_that_are_not_there_are_named() -> None:
    config = model("llama").config
    check_layers(config, (0, 4), "m")
    with pytest.raises(ModelError, match="5 is not one of the 5 layers of m"):
        check_layers(config, (0, 5), "m")
    with pytest.raises(ModelError, match=r"\[2, 1\] are not in order"):
        check_layers(config, (2, 1), "m")


def test_a_narrower_model_keeps_the_width_of_heads() -> None:
    whole = model("llama")
    config = narrower_config(whole.config, hidden_size=24, num_layers=2, name="m")
    small = new_model(type(whole), config, seed=0)
    assert (config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers) == (3, 1, 2)
    assert small(IDS).logits.shape == (1, 6, 40)
    assert small.num_parameters() < whole.num_parameters() / 2
    with pytest.raises(ModelError, match="20 is not a multiple of 8"):
        narrower_config(whole.config, hidden_size=20, num_layers=2, name="m")
