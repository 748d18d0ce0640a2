"""Attention over packed sequences: several sequences in one row, and none sees another.

A micro-batch is one row of all its tokens, with the borders of the sequences (`cu_seq_lens`, flash-attention's form).
`segments` runs PyTorch's SDPA on one sequence at a time: no mask is built and no product over a border is computed,
which on a CPU beats one large masked product (a row of 1,024 tokens holds about seven conversations of Alpaca's
length). The price is a Python call for each sequence and layer.
"""

import importlib.util
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from raylm.errors import ModelError

SEGMENTS = "raylm_segments"


def resolve_attention(name: str, device: torch.device) -> str:
    """The transformers name of the implementation that `model.attention` asks for.

    Raises ModelError when flash_attention_2 is asked for and cannot run.
    """
    flash = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    if name == "flash_attention_2" and not flash:
        raise ModelError(
            "model.attention=flash_attention_2",
            "needs a CUDA device and the package flash-attn.",
            "Install it, or set model.attention=auto.",
        )
    if name == "auto":
        name = "flash_attention_2" if flash else "segments"
    if name == "segments":
        _register()
        return SEGMENTS
    return name


def packed_arguments(seq_lengths: Tensor, implementation: str, device: torch.device) -> dict[str, Any]:
    """What a transformers model needs besides input_ids and position_ids to keep packed sequences apart.

    seq_lengths: (s,) int64 tokens of each sequence, on the CPU. sdpa and eager find the borders in position_ids.
    """
    if implementation in ("sdpa", "eager"):
        return {}
    borders = torch.zeros(len(seq_lengths) + 1, dtype=torch.int32)
    torch.cumsum(seq_lengths, 0, out=borders[1:])
    longest = int(seq_lengths.max())
    if implementation != SEGMENTS:  # which reads the borders on the CPU; flash-attention's kernel wants them beside q
        borders = borders.to(device)
    if implementation == SEGMENTS:
        return {"cu_seq_lens_q": borders}  # a compiled block would be compiled anew for each longest sequence
    return {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest}


@torch.compiler.disable
def segments_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of one packed row, in the form transformers calls it.

    query: (1, heads, tokens, head_dim); key, value: (1, kv_heads, tokens, head_dim). cu_seq_lens_q: (s + 1,) borders;
    without it the whole row is one sequence. Returns (1, tokens, heads, head_dim). Raises ModelError for score
    capping (Gemma 2), which SDPA cannot do.
    """
    if softcap is not None:
        raise ModelError("model.attention=segments", "cannot cap attention scores.", "Set model.attention=eager.")
    if attention_mask is not None or query.shape[0] != 1:
        raise ModelError("model.attention=segments", "takes one packed row and no mask.", "Set model.attention=sdpa.")
    borders = [0, query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for start, end in pairwise(borders):
        length = end - start
        banded = sliding_window is not None and length > sliding_window
        outputs.append(
            scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, start:end],
                value[:, :, start:end],
                attn_mask=_band(length, int(sliding_window or 0), query.device) if banded else None,
                dropout_p=dropout,
                is_causal=not banded,
                scale=scaling,
                enable_gqa=grouped,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _band(length: int, window: int, device: torch.device) -> Tensor:
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


def _register() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(SEGMENTS, segments_attention)
