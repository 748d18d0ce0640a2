"""A repair of vLLM 0.32's CPU engine, which its workers load when speculation is on.

Checking guesses at a temperature spreads each request's temperature, top_k and top_p over its tokens. vLLM's CPU kernel
for that writes into a copy of the output that is thrown away unless it holds int64, so answers are sampled at a
temperature that is whatever the memory held: silently wrong (vllm/utils/cpu_triton_utils.py, `_expand_kernel_impl`).
Drop this file when vLLM's own `expand_batch_to_tokens` passes tests/models/test_vllm_cpu.py.
"""

import torch


class SpeculationRepair:
    """vLLM makes it a base of its worker; what counts is that this module is imported there."""


def expand_batch_to_tokens(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> torch.Tensor:
    """Each value of `x` as often as its request has tokens, `replace_to` in place of `replace_from`.

    x: (requests,), any type; cu_num_tokens: (requests,) running totals of their tokens. Returns (num_tokens,).
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1)).long()
    return torch.where(x == replace_from, replace_to, x).repeat_interleave(counts, output_size=num_tokens)


def _repair() -> None:
    from vllm.v1.sample import rejection_sampler

    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens


_repair()
