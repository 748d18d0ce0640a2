"""Which packed rows each step of a run reads: the whole order of a run, known before it starts.

Global batch k is a function of (lengths, seed, epoch, k) alone. A position in the run is one number, the step; reading
from there needs nothing that came before. The last batch of an epoch is short; it is not filled from the next epoch,
so every sequence is used exactly once in each.
"""

from dataclasses import dataclass

import numpy as np

from raylm.data.pack import EpochPlan, plan_epoch


@dataclass(frozen=True, slots=True)
class RunPlan:
    """The order of a run: its epochs, cut into global batches of `global_batch_size` packed rows."""

    epochs: tuple[EpochPlan, ...]
    global_batch_size: int
    num_steps: int
    """Steps of the run, after `max_steps`."""

    def steps_in_epoch(self, epoch: int) -> int:
        """Global batches in an epoch, the short last one included."""
        return -(-self.epochs[epoch].num_rows // self.global_batch_size)

    def tokens_per_step(self, lengths: np.ndarray) -> float:
        """Tokens of a global batch of sequences of these lengths, on average over the first epoch."""
        return float(lengths[self.epochs[0].sequences].sum()) / max(1, self.steps_in_epoch(0))

    def row(self, step: int, place: int) -> tuple[int, np.ndarray]:
        """Epoch and sequences of packed row `place` in the global batch at `step` (0-based); no sequences past the
        epoch's end."""
        first = 0
        for epoch, plan in enumerate(self.epochs):
            steps = self.steps_in_epoch(epoch)
            if step < first + steps:
                return epoch, plan.row((step - first) * self.global_batch_size + place)
            first += steps
        raise IndexError(f"step {step} is past the end of the run ({first} steps)")


def plan_run(
    lengths: np.ndarray,
    *,
    max_seq_len: int,
    packing: bool,
    shuffle: bool,
    seed: int,
    num_epochs: int,
    global_batch_size: int,
    max_steps: int | None = None,
    weights: np.ndarray | None = None,
) -> RunPlan:
    """The order of a run over sequences of the given lengths; epochs that `max_steps` never reaches are not planned.

    weights: (n,) how often an epoch uses each sequence; once where it is None.
    """
    epochs: list[EpochPlan] = []
    num_steps = 0
    for epoch in range(num_epochs):
        if max_steps is not None and num_steps >= max_steps:
            break
        plan = plan_epoch(
            lengths,
            max_seq_len=max_seq_len,
            packing=packing,
            shuffle=shuffle,
            seed=seed,
            epoch=epoch,
            weights=weights,
        )
        epochs.append(plan)
        num_steps += -(-plan.num_rows // global_batch_size)
    return RunPlan(tuple(epochs), global_batch_size, num_steps if max_steps is None else min(num_steps, max_steps))
