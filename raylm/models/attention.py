"""Attention over packed sequences: several sequences in one row, and none sees another.

A micro-batch is one row of all its tokens, with the borders of the sequences (`cu_seq_lens`, flash-attention's form).
`segments` runs PyTorch's SDPA on one sequence at a time: no mask is built and no product over a border is computed,
which on a CPU beats one large masked product (a row of 1,024 tokens holds about seven conversations of Alpaca's
length). The price is a Python call for each sequence and layer.
"""

import importlib.util
import logging
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from raylm.errors import ModelError

SEGMENTS = "raylm_segments"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRow:
    """What an implementation needs. not_on_cpu: why it does not train there; package: import name of its kernels;
    capability: least compute capability of the GPU."""

    not_on_cpu: str = ""
    package: str = ""
    capability: int = 0


ATTENTIONS = {
    "segments": AttentionRow(),
    "sdpa": AttentionRow(),
    "eager": AttentionRow(),
    "flex_attention": AttentionRow(not_on_cpu="PyTorch's FlexAttention has no backward pass on CPUs"),
    "flash_attention_2": AttentionRow(not_on_cpu="its kernels are for CUDA", package="flash_attn"),
    "flash_attention_3": AttentionRow(
        not_on_cpu="its kernels are for CUDA", package="flash_attn_interface", capability=9
    ),
}
BY_SPEED = ("flash_attention_3", "flash_attention_2", "flex_attention")
"""What `auto` tries on a GPU before `segments`."""


def check_attention(name: str, *, on_gpu: bool) -> None:
    """Raises ModelError for an implementation that does not train on a CPU, where that is what there is."""
    row = ATTENTIONS.get(name)
    if row is not None and row.not_on_cpu and not on_gpu:
        raise ModelError(
            f"model.attention={name}", f"needs a CUDA device: {row.not_on_cpu}.", "Set model.attention=auto."
        )


def resolve_attention(name: str, device: torch.device, *, supports_flex: bool = True) -> str:
    """The transformers name of the implementation that `model.attention` asks for.

    supports_flex: the model's class runs FlexAttention. Raises ModelError when what is asked for cannot run, with the
    reason.
    """
    if name == "auto":
        name = next((row for row in BY_SPEED if not _missing(row, device, supports_flex)), "segments")
    check_attention(name, on_gpu=device.type == "cuda")
    missing = _missing(name, device, supports_flex)
    if missing:
        raise ModelError(f"model.attention={name}", f"needs {missing}.", "Set model.attention=auto.")
    logger.info("attention: %s", name)
    if name == "segments":
        _register()
        return SEGMENTS
    return name


def _missing(name: str, device: torch.device, supports_flex: bool) -> str:
    """What an implementation lacks here; empty where it runs."""
    row = ATTENTIONS[name]
    if row.not_on_cpu and device.type != "cuda":
        return "a CUDA device"
    if row.package and importlib.util.find_spec(row.package) is None:
        return f"the package {row.package}"
    if row.capability and torch.cuda.get_device_capability(device)[0] < row.capability:
        return f"a GPU of compute capability {row.capability}.0"
    if name == "flex_attention" and not supports_flex:
        return "a model class that transformers runs with it"
    return ""


def packed_arguments(seq_lengths: Tensor, implementation: str, device: torch.device) -> dict[str, Any]:
    """What a transformers model needs besides input_ids and position_ids to keep packed sequences apart.

    seq_lengths: (s,) int64 tokens of each sequence, on the CPU. sdpa, eager and flex_attention build a mask of blocks
    from position_ids, which begin anew in each.
    """
    if implementation in ("sdpa", "eager", "flex_attention"):
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
