"""Attention over packed sequences: several sequences in one row, and none sees another.

A micro-batch is one row of all its tokens, with the borders of the sequences (`cu_seq_lens`, flash-attention's form).
`segments` runs PyTorch's SDPA on one sequence at a time: no mask is built and no product over a border is computed,
which on a CPU beats one large masked product (a row of 1,024 tokens holds about seven conversations of Alpaca's
length). The price is a Python call for each sequence and layer.
"""

import importlib.metadata
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
    """What an implementation needs. not_on_cpu: why it does not train there; package: name of the distribution with its
    kernels; capability: least compute capability of the GPU; half: its kernels multiply bf16 and fp16 only."""

    not_on_cpu: str = ""
    package: str = ""
    capability: int = 0
    half: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What of a model and a step an implementation depends on. supports_flex, supports_flash: transformers runs the
    model's class with it; dropout: of attention's probabilities; precision: that of a step."""

    supports_flex: bool = True
    supports_flash: bool = True
    head_dim: int | None = None
    dropout: float = 0.0
    precision: str = "bf16"


ATTENTIONS = {
    "segments": AttentionRow(),
    "sdpa": AttentionRow(),
    "eager": AttentionRow(),
    "flex_attention": AttentionRow(not_on_cpu="PyTorch's FlexAttention has no backward pass on CPUs", capability=8),
    "flash_attention_2": AttentionRow(
        not_on_cpu="its kernels are for CUDA", package="flash-attn", capability=8, half=True
    ),
    "flash_attention_3": AttentionRow(
        not_on_cpu="its kernels are for CUDA", package="flash-attn-3", capability=9, half=True
    ),
}
BY_SPEED = ("flash_attention_3", "flash_attention_2", "flex_attention")
"""What `auto` tries on a GPU before `segments`."""
FLEX_LEAST_HEAD_DIM = 16
"""Of the kernels that PyTorch 2.13 makes."""


def check_attention(name: str, *, on_gpu: bool) -> None:
    """Raises ModelError for an implementation that does not train on a CPU, where that is what there is."""
    row = ATTENTIONS.get(name)
    if row is not None and row.not_on_cpu and not on_gpu:
        raise ModelError(
            f"model.attention={name}", f"needs a CUDA device: {row.not_on_cpu}.", "Set model.attention=auto."
        )


def resolve_attention(name: str, device: torch.device, traits: Traits | None = None) -> str:
    """The transformers name of the implementation that `model.attention` asks for.

    Raises ModelError when what is asked for cannot run, with the reason.
    """
    traits = traits or Traits()
    if name == "auto":
        name = next((row for row in BY_SPEED if not _missing(row, device, traits)), "segments")
    check_attention(name, on_gpu=device.type == "cuda")
    missing = _missing(name, device, traits)
    if missing:
        raise ModelError(f"model.attention={name}", f"needs {missing}.", "Set model.attention=auto.")
    logger.info("attention: %s", name)
    if name == "segments":
        _register()
        return SEGMENTS
    return name


def _missing(name: str, device: torch.device, traits: Traits) -> str:
    """What an implementation lacks here; empty where it runs."""
    row, is_flex = ATTENTIONS[name], name == "flex_attention"
    if row.not_on_cpu and device.type != "cuda":
        return "a CUDA device"
    if row.package and not _is_installed(row.package):
        return f"the package {row.package}"
    if row.capability and torch.cuda.get_device_capability(device)[0] < row.capability:
        return f"a GPU of compute capability {row.capability}.0"
    if row.half and traits.precision == "fp32":
        return "steps in bf16 or fp16 (training.precision)"
    if (is_flex and not traits.supports_flex) or (row.half and not traits.supports_flash):
        return "a model class that transformers runs with it"
    if is_flex and traits.head_dim is not None and traits.head_dim < FLEX_LEAST_HEAD_DIM:
        return f"heads of {FLEX_LEAST_HEAD_DIM} dimensions or more"
    if is_flex and traits.dropout:
        return "a model without attention dropout"
    return ""


def _is_installed(distribution: str) -> bool:
    """By the distribution: other ones bring modules of the same name."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


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
