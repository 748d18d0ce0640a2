"""LISA: every few steps other decoder blocks are trained, the rest is frozen. Source: arXiv:2403.17919, Algorithm 1.

Only what is being trained has gradients and optimizer state, so memory is that of a few blocks whatever the number of
intervals. Which blocks an interval trains is a function of (seed, interval) alone: all ranks choose alike, and a run
that is resumed within an interval goes on with the same ones.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from raylm.config.training import LisaSection
from raylm.errors import ConfigError
from raylm.models.adapters import base_of
from raylm.models.blocks import decoder_blocks
from raylm.words import counted

_STREAM = 2403  # keeps the draws apart from others of the same seed


class Lisa:
    """The parameters that each interval trains, by name."""

    def __init__(
        self, section: LisaSection, model: Any, named: Sequence[tuple[str, nn.Parameter]], *, seed: int
    ) -> None:
        """model: a transformers model; named: the parameters that may be trained. Raises ModelError."""
        self._section, self._seed = section, seed
        self._blocks = _block_of(model, [name for name, _ in named])
        self.num_layers = len(decoder_blocks(model))
        always = _outside_blocks(model, section.always_active)
        self._always = frozenset(name for name, block in self._blocks.items() if block is None and name in always)

    def interval_of(self, step: int) -> int:
        """The interval that `step` (0-based) lies in."""
        return step // self._section.interval_steps

    def begins_interval(self, step: int) -> bool:
        """True at the first step of an interval."""
        return step % self._section.interval_steps == 0

    def layers(self, interval: int) -> tuple[int, ...]:
        """The blocks of an interval, in order of their numbers."""
        rng = np.random.default_rng([self._seed, _STREAM, interval])
        weights = self._section.layer_weights
        shares = None if weights is None else np.asarray(weights) / sum(weights)
        drawn = rng.choice(self.num_layers, self._section.num_active_layers, replace=False, p=shares)
        return tuple(sorted(drawn.tolist()))

    def names(self, interval: int) -> frozenset[str]:
        """The parameters of an interval."""
        layers = self.layers(interval)
        return self._always | {name for name, block in self._blocks.items() if block in layers}


def check_lisa(section: LisaSection, model_config: Any) -> None:
    """Raises ConfigError where the settings do not fit the number of layers."""
    number = model_config.get_text_config().num_hidden_layers
    if section.num_active_layers > number:
        raise ConfigError(
            "lisa.num_active_layers",
            f"{section.num_active_layers} is more than the model's {counted(number, 'layer')}.",
        )
    if section.layer_weights is not None and len(section.layer_weights) != number:
        raise ConfigError(
            "lisa.layer_weights",
            f"has {counted(len(section.layer_weights), 'value')}, the model has {counted(number, 'layer')}.",
            "Give one each.",
        )


def _block_of(model: Any, names: Sequence[str]) -> dict[str, int | None]:
    """Name of a parameter -> the number of its decoder block, None for one outside."""
    blocks = decoder_blocks(model)
    prefix = next(name for name, module in model.named_modules() if module is blocks) + "."
    return {name: int(name[len(prefix) :].split(".")[0]) if name.startswith(prefix) else None for name in names}


def _outside_blocks(model: Any, kinds: Sequence[str]) -> set[str]:
    """Names of the parameters outside the blocks that are of some kinds; a tied one is of both of its kinds."""
    head = base_of(model).get_output_embeddings()
    found: dict[int, set[str]] = {}
    for module in model.modules():
        kind = "head" if module is head else "embeddings" if isinstance(module, nn.Embedding) else "final_norm"
        for parameter in module.parameters(recurse=False):
            found.setdefault(id(parameter), set()).add(kind)
    return {name for name, parameter in model.named_parameters() if found[id(parameter)] & set(kinds)}
