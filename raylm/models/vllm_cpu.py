"""Two repairs of vLLM 0.32's CPU engine, which its workers load before the model.

Intel's matrix unit (AMX) is used with bfloat16 wherever the processor has it, but Linux lends its registers only to a
process that asks, and the process dies of an illegal instruction otherwise. oneDNN asks when a product is large enough
for it; with a small model the attention kernel comes first.

Checking guesses at a temperature spreads each request's temperature, top_k and top_p over its tokens. vLLM's CPU kernel
for that writes into a copy of the output that is thrown away unless it holds int64, so answers are sampled at a
temperature that is whatever the memory held: silently wrong (vllm/utils/cpu_triton_utils.py, `_expand_kernel_impl`).
Drop a repair when vLLM passes its part of tests/models/test_vllm_cpu.py without it.
"""

import torch


class CpuRepair:
    """vLLM makes it a base of its worker; what counts is that this module is imported there."""


def expand_batch_to_tokens(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> torch.Tensor:
    """Each value of `x` as often as its request has tokens, `replace_to` in place of `replace_from`.

    x: (requests,), any type; cu_num_tokens: (requests,) running totals of their tokens. Returns (num_tokens,).
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1)).long()
    return torch.where(x == replace_from, replace_to, x).repeat_interleave(counts, output_size=num_tokens)


def ask_for_amx() -> None:
    """For this process and all its threads. Raises RuntimeError where the system refuses what the processor has."""
    if torch.cpu._is_amx_tile_supported() and not torch.cpu._init_amx():
        raise RuntimeError("the system does not lend this processor's AMX registers: set dtype=float32")


def _repair() -> None:
    ask_for_amx()
    from vllm.v1.sample import rejection_sampler

    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens


_repair()
