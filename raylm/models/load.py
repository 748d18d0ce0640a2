"""A model in: configuration checks that need no weights, then weights in fp32 as master copy."""

from typing import Any

import torch

from raylm.config.sections import ModelSection
from raylm.errors import ModelError
from raylm.models.attention import resolve_attention
from raylm.models.folder import as_folder, is_adapter
from raylm.models.rope import max_positions, scale_rope


def load_config(section: ModelSection) -> Any:
    """The transformers configuration of a model. Raises ModelError."""
    from transformers import AutoConfig

    folder = as_folder(section.path, section.revision)
    if is_adapter(folder):
        raise ModelError(section.path, "is an adapter, not a whole model.", "Give the model it was trained on.")
    try:
        config = AutoConfig.from_pretrained(
            folder, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ModelError(section.path, f"cannot be loaded: {_first_line(error)}", "Check model.path.") from None
    if section.rope is not None:
        scale_rope(config, section.rope, section.path)
    return config


def check_max_seq_len(section: ModelSection, model_config: Any, max_seq_len: int) -> None:
    """Raises ModelError when rows could be longer than the model's positions."""
    limit = max_positions(model_config)
    if limit is not None and max_seq_len > limit:
        raise ModelError(
            "data.max_seq_len",
            f"{max_seq_len} is above the {limit} positions of {section.path}.",
            f"Set data.max_seq_len={limit} or less, or extend them with model.rope.",
        )


def load_model(section: ModelSection, device: torch.device) -> Any:
    """A causal language model in fp32 on `device`, ready for packed rows. Raises ModelError."""
    model = _load(section, dtype=torch.float32, attn_implementation=attention_of(section, device))
    model.config.use_cache = False
    return model.to(device)


def attention_of(section: ModelSection, device: torch.device) -> str:
    """The transformers name of the attention that a model is loaded with. Raises ModelError."""
    if device.type == "cpu":
        return resolve_attention(section.attention, device)
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(load_config(section)), None)
    supports_flex = bool(getattr(kind, "_supports_flex_attn", False))
    return resolve_attention(section.attention, device, supports_flex=supports_flex)


def structure_of(section: ModelSection) -> Any:
    """The model's modules without weights (on the meta device). Raises ModelError."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        try:
            return AutoModelForCausalLM.from_config(load_config(section), trust_remote_code=section.trust_remote_code)
        except ValueError as error:
            raise ModelError(section.path, f"cannot be loaded: {_first_line(error)}", "Check model.path.") from None


def load_as_stored(section: ModelSection, **options: Any) -> Any:
    """A causal language model on the CPU with its weights in the type they are stored in. options: further arguments
    of `from_pretrained`. Raises ModelError."""
    return _load(section, dtype="auto", **options)


def _load(section: ModelSection, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    if section.rope is not None:
        options["config"] = load_config(section)
    try:
        return AutoModelForCausalLM.from_pretrained(
            as_folder(section.path, section.revision),
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            use_safetensors=True,
            **options,
        )
    except (OSError, ValueError) as error:
        raise ModelError(section.path, f"cannot be loaded: {_first_line(error)}", "Check model.path.") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
