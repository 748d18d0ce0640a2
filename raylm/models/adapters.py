"""Low-rank adapters through PEFT: put into a model, merged out of it."""

import copy
from typing import Any

import torch

from raylm.config.training import LoraSection
from raylm.errors import ModelError


def add_lora(model: Any, section: LoraSection, *, seed: int) -> Any:
    """The model with adapters in its linear modules; only they require gradients.

    Raises ModelError when a name in `lora.target_modules` matches no linear module.
    """
    from peft import LoraConfig, get_peft_model

    if section.target_modules != "all-linear":
        _check_targets(model, section.target_modules)
    torch.manual_seed(seed)  # lora_A is drawn at random, alike on all ranks
    targets = section.target_modules if isinstance(section.target_modules, str) else list(section.target_modules)
    return get_peft_model(
        model,
        LoraConfig(
            r=section.rank,
            lora_alpha=section.alpha,
            lora_dropout=section.dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
        ),
    )


def base_of(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def merged(model: Any) -> Any:
    """A copy of a PEFT model's transformers model with the adapters added into its weights, in the weights' dtype."""
    return copy.deepcopy(model).merge_and_unload()


def _check_targets(model: Any, names: tuple[str, ...]) -> None:
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    missing = [target for target in names if not any(n == target or n.endswith(f".{target}") for n in linear)]
    if missing:
        known = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise ModelError(
            "lora.target_modules",
            f"{', '.join(missing)} match no linear module of the model.",
            f"Its linear modules are {', '.join(known)}.",
        )
