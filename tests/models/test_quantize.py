"""NF4 against its papers, written out in numpy."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config
from transformers.models.auto import AutoModelForCausalLM

from raylm.config.sections import ModelSection
from raylm.errors import ModelError
from raylm.models.blocks import decoder_blocks
from raylm.models.load import load_model
from raylm.models.quantize import check_bitsandbytes, check_quantizable, load_quantized, num_elements
from tests.tiny import build_tiny_model

CPU = torch.device("cpu")
# arXiv:2305.14314, appendix E.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
NF4 += [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
NF4 += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def _dynamic_code() -> np.ndarray:
    """The 8-bit floats of arXiv:2110.02861, section 2.1: a decimal exponent, and a linear fraction of 0.1 to 1."""
    values = [0.0, 1.0]
    for bits in range(7):
        edges = np.linspace(0.1, 1.0, 2**bits + 1)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (bits - 6)
        values += [*middles, *-middles]
    return np.sort(np.array(values))


def _nearest(values: np.ndarray, code: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of a code, and whether it is by more than the step of bitsandbytes' search on a CPU."""
    distance = np.abs(values[..., None] - code)
    order = np.sort(distance, axis=-1)
    return code[distance.argmin(-1)], order[..., 1] - order[..., 0] > 6e-5


def double_dequantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a matrix becomes: blocks of 64, whose magnitudes, less their mean, are 8-bit floats in blocks of 256.

    And where that is beyond doubt.
    """
    blocks = weight.detach().double().numpy().reshape(-1, 64)
    magnitudes = np.abs(blocks).max(1)
    mean = magnitudes.mean()
    rest = magnitudes - mean
    known, sure = np.empty_like(rest), np.empty(rest.shape, bool)
    for start in range(0, len(rest), 256):
        part = slice(start, start + 256)
        scale = np.abs(rest[part]).max()
        values, sure[part] = _nearest(rest[part] / scale, _dynamic_code())
        known[part] = values * scale
    codes, clear = _nearest(blocks / magnitudes[:, None], np.array(NF4))
    whole = (codes * (known + mean)[:, None]).reshape(weight.shape)
    certain = (clear & sure[:, None]).reshape(weight.shape)
    assert certain.mean() > 0.95
    return torch.from_numpy(whole).float(), torch.from_numpy(certain)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 640 blocks of 64 in its largest matrices."""
    folder = tmp_path_factory.mktemp("model") / "model"
    return build_tiny_model(folder, hidden_size=128, intermediate_size=320, attention_bias=True)


def _pairs(folder: Path, dtype: torch.dtype = torch.float32) -> list[tuple[Any, Any]]:
    """Quantised linear modules beside those they were made of."""
    section = ModelSection(path=str(folder))
    quantized, plain = load_quantized(section, CPU, compute_dtype=dtype), load_model(section, CPU)
    others = dict(quantized.named_modules())
    return [
        (others[name], module)
        for name, module in plain.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]


@torch.no_grad()
def _weight_of(quantized: Any) -> torch.Tensor:
    """What a module multiplies with."""
    bias = 0 if quantized.bias is None else quantized.bias
    return (quantized(torch.eye(quantized.in_features)) - bias).t()


def test_weights_become_what_the_papers_say(model_dir: Path) -> None:
    pairs = _pairs(model_dir)
    assert len(pairs) == 14
    for quantized, plain in pairs:
        weight, certain = double_dequantized(plain.weight)
        torch.testing.assert_close(_weight_of(quantized)[certain], weight[certain], rtol=1e-4, atol=1e-6)
        assert 0.02 < (weight - plain.weight).abs().max() / plain.weight.abs().max() < 0.2, "not the plain weight"


def test_products_and_gradients_are_those_of_the_weights(model_dir: Path) -> None:
    for quantized, _ in _pairs(model_dir):
        weight = _weight_of(quantized)
        states = torch.randn(2, 5, quantized.in_features, requires_grad=True)
        output = quantized(states)
        bias = 0 if quantized.bias is None else quantized.bias
        torch.testing.assert_close(output, states @ weight.t() + bias, rtol=1e-4, atol=1e-5)
        output.sum().backward()
        torch.testing.assert_close(states.grad, weight.sum(0).expand(2, 5, -1), rtol=1e-4, atol=1e-5)


def test_only_linear_modules_of_blocks_are_quantised_and_the_rest_is_fp32(model_dir: Path) -> None:
    model = load_quantized(ModelSection(path=str(model_dir)), CPU, compute_dtype=torch.float32)
    plain = load_model(ModelSection(path=str(model_dir)), CPU)
    for name, parameter in model.named_parameters():
        is_matrix = ".layers." in name and name.endswith("proj.weight")
        assert parameter.dtype == (torch.uint8 if is_matrix else torch.float32)
        assert num_elements(parameter) == plain.get_parameter(name).numel()
        if not is_matrix:
            assert torch.equal(parameter, plain.get_parameter(name))


def test_a_weight_takes_4_127_bits(model_dir: Path) -> None:
    linear = decoder_blocks(load_quantized(ModelSection(path=str(model_dir)), CPU, compute_dtype=torch.float32))[0].mlp
    weight = linear.down_proj.weight
    state = weight.quant_state
    held = (weight, state.absmax, state.state2.absmax)
    assert sum(part.nbytes for part in held) * 8 / num_elements(weight) == pytest.approx(4.127, abs=2e-3)


def test_a_stored_type_gives_the_codes_of_its_values(model_dir: Path, tmp_path: Path) -> None:
    """bf16 weights are quantised as they are, without a copy of the whole model in fp32."""
    plain = load_model(ModelSection(path=str(model_dir)), CPU).bfloat16()
    plain.save_pretrained(tmp_path)
    for quantized, stored in _pairs(tmp_path):
        weight, certain = double_dequantized(stored.weight)
        torch.testing.assert_close(_weight_of(quantized)[certain], weight[certain], rtol=1e-4, atol=1e-6)


def test_gradients_pass_after_a_forward_without(model_dir: Path) -> None:
    """bitsandbytes repacks weights for its CPU kernel in such a forward, and loses the gradient from then on."""
    quantized, _ = _pairs(model_dir)[0]
    states = torch.randn(1, 3, quantized.in_features)
    with torch.no_grad():
        quantized.eval()(states)
    states.requires_grad_(True)
    quantized.train()(states).sum().backward()
    assert states.grad is not None
    assert not quantized.support_avx512bf16_for_cpu


def test_a_model_without_linear_modules_is_refused() -> None:
    with torch.device("meta"):
        gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=2, n_head=4))
    with pytest.raises(ModelError, match=r"no linear modules in its decoder blocks.*Set training.method=lora"):
        check_quantizable(gpt2)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_bitsandbytes()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r"pip install 'raylm\[quantization\]'"):
        check_bitsandbytes()
