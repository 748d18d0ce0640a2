"""What the processor multiplies natively."""

import torch


def has_native_bf16(device: torch.device) -> bool:
    """True where bfloat16 products run in hardware: GPUs of 2020 and later, CPUs with AMX or AVX512-BF16.

    Other CPUs convert every element, and bf16 products are several times slower than fp32 ones.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
