"""The module a strategy wraps: a batch in, a summed loss out.

The decoder runs on all tokens, the output layer only where there are labels. That needs an output layer which is a
plain linear map of the decoder's last state, and attention which keeps packed sequences apart. Both are checked on the
loaded model with a small probe, never assumed from its name.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raylm.config.training import LossSection
from raylm.errors import ModelError
from raylm.models.adapters import base_of, output_layer
from raylm.models.attention import packed_arguments
from raylm.training.batch import Batch, batch_of
from raylm.training.hardware import autocast
from raylm.training.losses import drawn_labels, next_token_loss

PROBE_TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2, "fp16": 1e-2}


class LossModule(nn.Module):
    """A causal language model (or its PEFT form) with the next-token loss as its forward."""

    def __init__(self, model: Any, extras: LossSection | None = None) -> None:
        """extras: what the loss has besides in training mode."""
        super().__init__()
        self.model = model
        self._extras = extras or LossSection()
        self._draws_from: int | None = None
        if self._extras.neftune_alpha:
            base_of(model).get_input_embeddings().register_forward_hook(self._with_noise)
        self._trainable = frozenset(name for name, p in model.named_parameters() if p.requires_grad)

    def forward(self, batch: Batch) -> Tensor:
        """Summed loss in nats over the batch's labels, 0-d fp32."""
        causal = base_of(self.model)
        hidden, head = self.hidden(causal, batch), output_layer(causal)
        if self._draws_from is not None:
            labels = drawn_labels(hidden, *head, batch.labels, _uniforms(batch, self._draws_from))
            return next_token_loss(hidden, *head, labels)
        return self.loss_of(hidden, *head, batch.labels)

    @contextmanager
    def drawing_labels(self, seed: int) -> Iterator[None]:
        """Within the block the loss is that of labels which the model draws, without extras. Each position's draw
        depends on the seed and on its row."""
        self._draws_from = seed
        try:
            yield
        finally:
            self._draws_from = None

    def loss_of(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The summed loss of the decoder's states, and what it has besides in training mode (next_token_loss)."""
        extras = self._extras if self.training else LossSection()
        return next_token_loss(
            hidden, weight, bias, labels, label_smoothing=extras.label_smoothing, z_loss=extras.z_loss, dtype=dtype
        )

    def _with_noise(self, embedding: nn.Module, inputs: Any, embedded: Tensor) -> Tensor:
        """NEFTune. Source: arXiv:2310.05914, Algorithm 1, for each packed sequence by its own length."""
        if not self.training:
            return embedded
        lengths = self._seq_lengths.to(embedded.device)
        spread = self._extras.neftune_alpha / (lengths * embedded.shape[-1]).sqrt()
        widths = torch.repeat_interleave(spread, lengths)[None, :, None]
        return embedded + (torch.rand_like(embedded) * 2 - 1) * widths.to(embedded.dtype)

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Names, without this wrapper's own prefix, and parameters that required gradients when it was made.

        Some may be frozen for the moment (lisa.py).
        """
        return [(name, p) for name, p in self.model.named_parameters() if name in self._trainable]

    def hidden(self, causal: Any, batch: Batch) -> Tensor:
        """The decoder's last states, (tokens, hidden_size)."""
        self._seq_lengths = batch.seq_lengths
        decoder = getattr(causal, causal.base_model_prefix)
        output = decoder(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            **packed_arguments(batch.seq_lengths, causal.config._attn_implementation, batch.input_ids.device),
        )
        return output.last_hidden_state[0]


def _uniforms(batch: Batch, seed: int) -> Tensor:
    """(tokens,) fp32: drawn for each sequence by its own tokens, so that no packing and no rank changes them."""
    parts = []
    for ids in batch.input_ids[0].cpu().split(batch.seq_lengths.tolist()):
        digest = hashlib.blake2b(ids.numpy().tobytes(), digest_size=7, key=seed.to_bytes(8, "big")).digest()
        parts.append(torch.rand(len(ids), generator=torch.Generator().manual_seed(int.from_bytes(digest, "big"))))
    return torch.cat(parts).to(batch.input_ids.device)


@torch.no_grad()
def check_model(module: LossModule, name: str, *, packing: bool, precision: str = "fp32") -> None:
    """Runs three short random sequences packed and alone. precision: that of a step.

    Raises ModelError when a packed sequence sees its neighbours, or when the output layer does more than a product
    (scaling, capping), so that the loss would not be the model's.
    """
    causal = base_of(module.model)
    device = next(module.parameters()).device
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, causal.config.get_text_config().vocab_size, n).astype(np.int32) for n in (5, 9, 7)]
    was_training = module.training
    module.eval()
    # Fused kernels of attention take halves only; for all else, fp32 tells more.
    precision = precision if str(causal.config._attn_implementation).startswith("flash") else "fp32"
    tolerance = PROBE_TOLERANCE[precision]
    with autocast(precision, device):
        alone = [_states(module, [ids], device) for ids in sequences]
        ours = torch.nn.functional.linear(alone[1], *output_layer(causal))
        ids = torch.from_numpy(sequences[1].astype(np.int64))[None].to(device)
        theirs = causal(input_ids=ids, use_cache=False).logits[0]
        together = _states(module, sequences, device) if packing else torch.cat(alone)
    if not _close(ours, theirs, tolerance):
        raise ModelError(name, "its output layer scales or caps the logits, which is not supported yet.")
    if not _close(together, torch.cat(alone), tolerance):
        raise ModelError(
            name, "lets packed sequences see each other.", "Set data.packing=false, or try model.attention=sdpa."
        )
    module.train(was_training)


def _states(module: LossModule, sequences: list[np.ndarray], device: torch.device) -> Tensor:
    batch = batch_of(sequences, [np.ones(len(ids), bool) for ids in sequences])
    return module.hidden(base_of(module.model), batch.to(device))


def _close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    one, other = one.float(), other.float()
    return bool((one - other).abs().max() <= tolerance * other.abs().max().clamp(min=1.0))
