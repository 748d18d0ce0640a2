"""Position interpolation against the formulas of the papers written out, and vLLM against transformers."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from raylm.config import TrainConfig, load_config
from raylm.config.sections import ModelSection, RopeSection
from raylm.errors import ConfigError, ModelError
from raylm.models.load import check_max_seq_len, load_model
from raylm.models.load import load_config as load_model_config
from raylm.models.rope import max_positions, scale_rope

THETA, DIM, ORIGINAL, FACTOR = 10_000.0, 8, 256, 4.0
PLAIN = [THETA ** (-2 * i / DIM) for i in range(DIM // 2)]
TYPES: list[Any] = ["linear", "ntk", "yarn", "llama3"]


def _yarn() -> list[float]:
    """arXiv:2309.00071, section 3.2: a ramp between the dimensions that turn beta_fast and beta_slow times."""

    def dimension(turns: float) -> float:
        return DIM * math.log(ORIGINAL / (turns * 2 * math.pi)) / (2 * math.log(THETA))

    low, high = max(math.floor(dimension(32)), 0), min(math.ceil(dimension(1)), DIM - 1)
    found = []
    for i, frequency in enumerate(PLAIN):
        ramp = min(max((i - low) / (high - low), 0), 1)
        found.append(frequency / FACTOR * ramp + frequency * (1 - ramp))
    return found


def _llama3() -> list[float]:
    found = []
    for frequency in PLAIN:
        wavelength = 2 * math.pi / frequency
        smooth = (ORIGINAL / wavelength - 1) / (4 - 1)
        if wavelength < ORIGINAL / 4:
            found.append(frequency)
        elif wavelength > ORIGINAL / 1:
            found.append(frequency / FACTOR)
        else:
            found.append((1 - smooth) * frequency / FACTOR + smooth * frequency)
    return found


EXPECTED = {
    "linear": ([frequency / FACTOR for frequency in PLAIN], 1.0),
    "ntk": ([(THETA * FACTOR ** (DIM / (DIM - 2))) ** (-2 * i / DIM) for i in range(DIM // 2)], 1.0),
    "yarn": (_yarn(), 0.1 * math.log(FACTOR) + 1),
    "llama3": (_llama3(), 1.0),
}


def _section(folder: Path, kind: Any, **options: Any) -> ModelSection:
    return ModelSection(path=str(folder), rope=RopeSection(type=kind, factor=FACTOR, **options))


@pytest.mark.parametrize("kind", TYPES)
def test_frequencies_are_those_of_the_papers(tiny_model_dir: Path, kind: str) -> None:
    rotary = load_model(_section(tiny_model_dir, kind), torch.device("cpu")).model.rotary_emb
    frequencies, scale = EXPECTED[kind]
    torch.testing.assert_close(rotary.inv_freq, torch.tensor(frequencies), rtol=1e-5, atol=0)
    assert rotary.attention_scaling == pytest.approx(scale)


@pytest.mark.parametrize("kind", [*TYPES, "dynamic"])
def test_the_context_is_longer_by_the_factor(tiny_model_dir: Path, tmp_path: Path, kind: str) -> None:
    """For raylm, and for vLLM reading the saved configuration."""
    from vllm.config import ModelConfig

    section = _section(tiny_model_dir, kind)
    config = load_model_config(section)
    assert max_positions(config) == ORIGINAL * FACTOR
    check_max_seq_len(section, config, 1024)
    with pytest.raises(ModelError, match="above the 1024 positions"):
        check_max_seq_len(section, config, 1025)
    load_model(section, torch.device("cpu")).save_pretrained(tmp_path)
    assert max_positions(load_model_config(ModelSection(path=str(tmp_path)))) == ORIGINAL * FACTOR
    assert ModelConfig(str(tmp_path), skip_tokenizer_init=True).max_model_len == ORIGINAL * FACTOR


@pytest.mark.parametrize("kind", TYPES)
def test_vllm_turns_by_the_angles_of_transformers(tiny_model_dir: Path, tmp_path: Path, kind: str) -> None:
    from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    model = load_model(_section(tiny_model_dir, kind), torch.device("cpu"))
    model.save_pretrained(tmp_path)
    read = ModelConfig(str(tmp_path), skip_tokenizer_init=True)
    with set_current_vllm_config(VllmConfig()):
        theirs = get_rope(DIM, read.max_model_len, rope_parameters=read.hf_config.rope_parameters, dtype=torch.float32)
    positions = torch.tensor([0, 1, 255, 256, 700, 1023])
    cos, sin = model.model.rotary_emb(torch.zeros(1), positions[None])
    expected = torch.cat([cos[0, :, : DIM // 2], sin[0, :, : DIM // 2]], -1)
    torch.testing.assert_close(theirs.cos_sin_cache[positions].float(), expected, rtol=1e-4, atol=1e-4)


def test_a_scaling_of_the_models_own_is_kept_unless_another_is_asked_for(tiny_model_dir: Path, tmp_path: Path) -> None:
    load_model(_section(tiny_model_dir, "yarn"), torch.device("cpu")).save_pretrained(tmp_path)
    kept = load_model_config(ModelSection(path=str(tmp_path))).rope_parameters
    assert (kept["rope_type"], kept["factor"]) == ("yarn", FACTOR)
    other = load_model_config(ModelSection(path=str(tmp_path), rope=RopeSection(type="linear", factor=2)))
    assert other.rope_parameters["rope_type"] == "linear"
    assert max_positions(other) == 2 * ORIGINAL  # of what it was trained on, not of what yarn made of it


def test_models_that_cannot_be_scaled_are_refused() -> None:
    from transformers import Gemma3TextConfig, GPT2Config

    section = RopeSection(type="linear", factor=2)
    with pytest.raises(ModelError, match="has no rotary positions"):
        scale_rope(GPT2Config(), section, "m")
    with pytest.raises(ModelError, match="for each kind of layer"):
        scale_rope(Gemma3TextConfig(), section, "m")


def test_dynamic_scaling_is_refused_for_packed_rows() -> None:
    base: Any = {"model.path": "m", "data.train": "d.json", "model.rope.type": "dynamic", "model.rope.factor": 2}
    with pytest.raises(ConfigError, match="follow the longest sequence of a batch"):
        load_config(TrainConfig, {}, base)
    assert load_config(TrainConfig, {}, {**base, "data.packing": False}).model.rope is not None
