from typing import Any

import pytest
import torch

from raylm.errors import ModelError
from raylm.models.blocks import decoder_blocks

SMALL = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("gemma", {"head_dim": 8}),
        ("phi", {}),
        ("phi3", {"pad_token_id": 0}),
        ("gpt_neox", {}),
        ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 64}),
        ("gpt2", {"n_layer": 3, "n_embd": 32, "n_head": 4}),
        ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 8}),
    ],
)
def test_blocks_are_found_in_every_architecture(kind: str, options: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **options}))
    blocks = decoder_blocks(model)
    assert len(blocks) == 3
    assert any("attn" in name or "attention" in name for name, _ in blocks[0].named_modules())


def test_a_model_without_blocks_is_refused(tiny_model_dir: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match="no list of 7 decoder blocks"):
        decoder_blocks(model)
