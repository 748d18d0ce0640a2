"""Decoder blocks in 4 bits: NF4 with double quantisation, by bitsandbytes. Source: arXiv:2305.14314, section 3.

A weight is the nearest of 16 values times the largest magnitude of its block of 64 (in the order of the rows); those
magnitudes, less their mean, are 8-bit floats in blocks of 256. That is 4.127 bits a weight. Norms, embeddings and the
output layer stay as they are.
"""

import importlib.util
import logging
from typing import Any

import torch
from torch import nn

from raylm.config.sections import ModelSection
from raylm.errors import ModelError
from raylm.models.blocks import decoder_blocks
from raylm.models.load import attention_of, load_as_stored

logger = logging.getLogger(__name__)


def check_bitsandbytes() -> None:
    """Raises ModelError when bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "training.method=qlora",
            "needs the package bitsandbytes.",
            "Install it: pip install 'raylm[quantization]' or pip install 'bitsandbytes>=0.50'.",
        )


def check_quantizable(model: Any) -> None:
    """Raises ModelError for a model without linear modules in its decoder blocks; needs no weights."""
    if not _linear_modules(model):
        raise ModelError(
            model.name_or_path or type(model).__name__,
            "has no linear modules in its decoder blocks, so there is nothing to quantise.",
            "Set training.method=lora.",
        )


def load_quantized(section: ModelSection, device: torch.device, *, compute_dtype: torch.dtype) -> Any:
    """A causal language model on `device` whose decoder blocks are NF4 and the rest fp32, ready for packed rows.

    The host holds its weights as they are stored, one matrix at a time goes to the device. Raises ModelError.
    """
    precision = "fp32" if compute_dtype == torch.float32 else "bf16"
    model = load_as_stored(section, attn_implementation=attention_of(section, device, precision=precision))
    model.config.use_cache = False
    quantize_blocks(model, device, compute_dtype=compute_dtype)
    return model.float().to(device)


def quantize_blocks(model: Any, device: torch.device, *, compute_dtype: torch.dtype) -> None:
    """Puts NF4 modules on `device` in place of the linear modules of the decoder blocks, one after the other.

    Products run in compute_dtype, over weights that are dequantised for each. Raises ModelError.
    """
    check_quantizable(model)
    blocks = decoder_blocks(model)
    total = sum(parameter.numel() for parameter in blocks.parameters())
    quantized = 0
    for name, linear in _linear_modules(model):
        parent, _, own = name.rpartition(".")
        quantized += linear.weight.numel()
        setattr(blocks.get_submodule(parent), own, _quantized(linear, device, compute_dtype))
    model.is_loaded_in_4bit = True  # PEFT asks for it
    logger.info("NF4 holds %s of %s parameters of the decoder blocks", f"{quantized:,}", f"{total:,}")


def num_elements(parameter: torch.Tensor) -> int:
    """Elements of a parameter; those of the matrix that it stands for where it is a packed 4-bit one."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())


def _linear_modules(model: Any) -> list[tuple[str, nn.Linear]]:
    """Of the decoder blocks, by their names in these."""
    return [(name, module) for name, module in decoder_blocks(model).named_modules() if type(module) is nn.Linear]


def _quantized(linear: nn.Linear, device: torch.device, compute_dtype: torch.dtype) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    module = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=compute_dtype,
        quant_type="nf4",
        device=torch.device("meta"),
    )
    weight = linear.weight.detach().float()
    module.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=module).to(device)
    if linear.bias is not None:
        module.bias = nn.Parameter(linear.bias.detach().float().to(device), requires_grad=False)
    # On AVX512-BF16 it would repack the weights in the first forward without gradients, for a kernel that has none.
    module.support_avx512bf16_for_cpu = False
    return module
