"""A micro-batch as tensors: all its tokens in one row, with the borders of its sequences."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raylm.data.stream import MicroBatch
from raylm.training.losses import IGNORE_INDEX


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed sequences, one after the other, without padding.

    input_ids, position_ids: (1, tokens) int64, positions restart at 0 in each sequence. labels: (tokens,) int64, the
    token that follows, IGNORE_INDEX where it carries no loss or belongs to the next sequence. seq_lengths: (s,) int64
    on the CPU. loss_tokens: how many labels count.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    seq_lengths: Tensor
    loss_tokens: int

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return self.input_ids.shape[1]

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device; seq_lengths stay on the CPU."""
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            self.position_ids.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.seq_lengths,
            self.loss_tokens,
        )


def to_batch(micro_batch: MicroBatch) -> Batch:
    """Joins the rows of a micro-batch. One without rows becomes a single token without loss: a rank that has none
    left in a short last batch still takes part in the collectives."""
    rows = [row for row in micro_batch.rows if len(row.input_ids)]
    if not rows:
        return empty_batch()
    ids, masks = [], []
    for row in rows:
        cuts = np.cumsum(row.seq_lengths)[:-1]
        ids += np.split(row.input_ids, cuts)
        masks += np.split(row.loss_mask, cuts)
    return batch_of(ids, masks)


def empty_batch() -> Batch:
    """A single token without loss."""
    return batch_of([np.zeros(1, np.int32)], [np.zeros(1, bool)])


def batch_of(input_ids: list[np.ndarray], loss_masks: list[np.ndarray]) -> Batch:
    """The batch of some sequences: input_ids and loss_masks, each (n,), the mask True where a token carries loss."""
    lengths = np.array([len(ids) for ids in input_ids], np.int64)
    flat = np.concatenate(input_ids).astype(np.int64)
    carries = np.concatenate(loss_masks).astype(bool)
    starts = np.cumsum(lengths) - lengths
    carries[starts] = False
    labels = np.full(len(flat), IGNORE_INDEX, np.int64)
    labels[:-1] = np.where(carries[1:], flat[1:], IGNORE_INDEX)
    positions = np.arange(len(flat)) - np.repeat(starts, lengths)
    return Batch(
        torch.from_numpy(flat)[None],
        torch.from_numpy(positions)[None],
        torch.from_numpy(labels),
        torch.from_numpy(lengths),
        int(carries.sum()),
    )
