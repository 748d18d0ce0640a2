"""The diagonal of the Gauss-Newton matrix by one more pass over a step's rows, for optimizers that ask for it.

Gauss-Newton-Bartlett, arXiv:2305.14342, Algorithm 2: labels are drawn from the model's own distribution at every
position that carries loss; the square of the mean loss's gradient, times the number of labels, is the estimate.
"""

from collections.abc import Callable, Sequence

import torch

from raylm.training.batch import Batch
from raylm.training.hardware import autocast
from raylm.training.scaling import LossScaler
from raylm.training.strategies.base import Strategy


def estimate_hessian(
    strategy: Strategy,
    micro_batches: Sequence[Batch],
    *,
    precision: str,
    seed: int,
    alive: Callable[[str], None] = lambda doing: None,
    scaler: LossScaler | None = None,
) -> None:
    """Gives the optimizer an estimate from a global batch; called by all ranks. Leaves no gradients.

    seed: of the draws, which depend on it and on the rows, not on ranks. An estimate that is not finite is left out.
    """
    counts = torch.tensor(sum(batch.loss_tokens for batch in micro_batches), dtype=torch.int64, device=strategy.device)
    num_labels = int(strategy.sum_over_ranks(counts))
    for index, batch in enumerate(micro_batches):
        alive(f"estimates curvature on micro-batch {index + 1} of {len(micro_batches)}")
        with strategy.accumulate(last=index == len(micro_batches) - 1), strategy.module.drawing_labels(seed):
            with autocast(precision, strategy.device):
                loss = strategy.loss(batch.to(strategy.device))
            strategy.backward(loss / num_labels * (scaler.scale if scaler else 1.0))
    if scaler:
        scaler.unscale(strategy.optimizer)
    strategy.take_estimate(num_labels)
