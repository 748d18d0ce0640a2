"""Packed attention against one sequence at a time (P01)."""

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MistralConfig, Qwen3Config
from transformers.models.auto import AutoModelForCausalLM

from raylm.errors import ModelError
from raylm.models.attention import (
    SEGMENTS,
    Traits,
    check_attention,
    packed_arguments,
    resolve_attention,
    segments_attention,
)

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


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        (name, attention)
        for attention in ("segments", "sdpa", "eager", "flex_attention")
        for name in CONFIGS
        if (name, attention) != ("gpt2", "flex_attention")
    ],
)
@torch.no_grad()
def test_packed_equals_one_at_a_time(name: str, attention: str) -> None:
    """FlexAttention has a forward on CPUs, no more; transformers' GPT-2 does not take it."""
    torch.manual_seed(0)
    implementation = attention if attention == "flex_attention" else resolve_attention(attention, CPU)
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


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("flash_attention_2", "its kernels are for CUDA"),
        ("flash_attention_3", "its kernels are for CUDA"),
        ("flex_attention", "has no backward pass on CPUs"),
    ],
)
def test_what_does_not_train_on_a_cpu_is_refused(name: str, reason: str) -> None:
    with pytest.raises(ModelError, match=f"needs a CUDA device: .*{reason}"):
        resolve_attention(name, CPU)
    with pytest.raises(ModelError, match=reason):
        check_attention(name, on_gpu=False)
    check_attention(name, on_gpu=True)
    check_attention("auto", on_gpu=False)


def test_the_choice_of_auto_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="raylm"):
        assert resolve_attention("auto", CPU) == SEGMENTS
    assert "attention: segments" in caplog.text


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """What the choice asks of one: an A100's compute capability."""
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    return torch.device("cuda")


def test_a_missing_package_is_named(a_gpu: torch.device) -> None:
    """flash-attn is in no lock of the tests."""
    with pytest.raises(ModelError, match=r"flash_attention_2: needs the package flash-attn\."):
        resolve_attention("flash_attention_2", a_gpu)
    assert resolve_attention("auto", a_gpu) == "flex_attention"


@pytest.mark.parametrize(
    ("traits", "reason"),
    [
        (Traits(supports_flex=False), "a model class that transformers runs with it"),
        (Traits(head_dim=8), "heads of 16 dimensions or more"),
        (Traits(dropout=0.1), "a model without attention dropout"),
    ],
)
def test_auto_passes_over_what_would_fail_in_a_step(traits: Traits, reason: str, a_gpu: torch.device) -> None:
    assert resolve_attention("auto", a_gpu, traits) == SEGMENTS
    with pytest.raises(ModelError, match=f"flex_attention: needs {reason}"):
        resolve_attention("flex_attention", a_gpu, traits)


@pytest.mark.parametrize(
    ("name", "capability", "traits", "chosen"),
    [
        ("flash_attention_2", (8, 0), Traits(), "flash_attention_2"),
        ("flash_attention_2", (8, 0), Traits(precision="fp32"), "flex_attention"),
        ("flash_attention_2", (8, 0), Traits(supports_flash=False), "flex_attention"),
        ("flash_attention_3", (8, 0), Traits(), "flash_attention_2"),
        ("flash_attention_3", (9, 0), Traits(), "flash_attention_3"),
        ("flash_attention_2", (7, 5), Traits(), SEGMENTS),
    ],
)
def test_auto_by_gpu_and_precision(
    name: str, capability: tuple[int, int], traits: Traits, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where both of flash-attention's packages are installed."""
    monkeypatch.setattr("importlib.metadata.version", lambda distribution: "9.0")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    assert resolve_attention("auto", torch.device("cuda"), traits) == chosen
    if chosen != name:
        with pytest.raises(ModelError, match=f"{name}: needs "):
            resolve_attention(name, torch.device("cuda"), traits)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3", SEGMENTS])
def test_borders_are_where_positions_begin_anew(implementation: str) -> None:
    """What flash-attention's varlen kernels are given, written out from position_ids; there is no mask."""
    position_ids = [position for length in LENGTHS for position in range(length)]
    borders = [place for place, position in enumerate(position_ids) if position == 0] + [len(position_ids)]
    arguments = packed_arguments(torch.tensor(LENGTHS), implementation, CPU)
    assert borders == [0, 5, 14, 15, 22]
    assert arguments["cu_seq_lens_q"].tolist() == borders
    assert arguments["cu_seq_lens_q"].dtype == torch.int32, "what the kernels take"
    if implementation != SEGMENTS:
        assert arguments["cu_seq_lens_k"] is arguments["cu_seq_lens_q"]
        assert arguments["max_length_q"] == arguments["max_length_k"] == max(LENGTHS)
    assert "attention_mask" not in arguments
