"""Packed attention against one sequence at a time (P01)."""

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MistralConfig, Qwen3Config
from transformers.models.auto import AutoModelForCausalLM

from raylm.errors import ModelError
from raylm.models.attention import packed_arguments, resolve_attention, segments_attention

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "mistral-window-4": MistralConfig(**SMALL, sliding_window=4),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32),
}
LENGTHS = (5, 9, 1, 7)


def _hidden(model: torch.nn.Module, ids: list[torch.Tensor], implementation: str) -> torch.Tensor:
    lengths = torch.tensor([len(part) for part in ids])
    positions = torch.cat([torch.arange(len(part)) for part in ids])[None]
    extra = packed_arguments(lengths, implementation, CPU)
    return model(input_ids=torch.cat(ids)[None], position_ids=positions, use_cache=False, **extra).logits[0]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("attention", ["segments", "sdpa", "eager"])
@torch.no_grad()
def test_packed_equals_one_at_a_time(name: str, attention: str) -> None:
    torch.manual_seed(0)
    implementation = resolve_attention(attention, CPU)
    packed = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=implementation).eval()
    plain = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager").eval()
    plain.load_state_dict(packed.state_dict())
    ids = [torch.randint(0, 64, (length,)) for length in LENGTHS]
    together = _hidden(packed, ids, implementation)
    alone = torch.cat([plain(input_ids=part[None], use_cache=False).logits[0] for part in ids])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    ids[0] = (ids[0] + 1) % 64
    torch.testing.assert_close(_hidden(packed, ids, implementation)[5:], together[5:], rtol=0, atol=0)


def test_score_capping_is_refused() -> None:
    states = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ModelError, match="cannot cap attention scores"):
        segments_attention(torch.nn.Module(), states, states, states, None, softcap=50.0)


def test_flash_attention_without_gpu_is_refused() -> None:
    with pytest.raises(ModelError, match="needs a CUDA device"):
        resolve_attention("flash_attention_2", CPU)
