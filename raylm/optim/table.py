"""The optimizers, one row each. Plain data: readable without torch."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerRow:
    """Where an optimizer lives and how it is called.

    factory: "package.module:attribute", imported on use; options: its arguments where ours differ from its defaults.
    """

    factory: str
    source: str
    options: dict[str, Any] = field(default_factory=dict)


OPTIMIZERS = {
    "adamw": OptimizerRow(
        factory="torch.optim:AdamW",
        source="arXiv:1711.05101, Algorithm 2",
        options={"betas": (0.9, 0.999), "eps": 1e-8, "fused": True},
    ),
}
