"""A model in: configuration checks that need no weights, then weights in fp32 as master copy."""

from typing import Any

import torch

from raylm.config.sections import ModelSection
from raylm.errors import ModelError
from raylm.models.attention import Traits, resolve_attention
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


def load_model(section: ModelSection, device: torch.device, *, precision: str = "fp32") -> Any:
    """A causal language model in fp32 on `device`, ready for packed rows. precision: that of a step, which says what
    attention can run. Raises ModelError."""
    place = {} if device.type == "cpu" else {"device_map": {"": device}}  # without a copy in host memory
    model = _load(
        section, dtype=torch.float32, attn_implementation=attention_of(section, device, precision=precision), **place
    )
    model.config.use_cache = False
    return model.to(device)


def attention_of(section: ModelSection, device: torch.device, *, precision: str) -> str:
    """The transformers name of the attention that a model is loaded with. Raises ModelError."""
    if device.type == "cpu":
        return resolve_attention(section.attention, device)
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = load_config(section)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    text = config.get_text_config()
    traits = Traits(
        supports_flex=bool(getattr(kind, "_supports_flex_attn", False)),
        supports_flash=bool(getattr(kind, "_supports_flash_attn", False)),
        head_dim=head_dim(config),
        dropout=getattr(text, "attention_dropout", None) or getattr(text, "attn_pdrop", None) or 0.0,
        precision=precision,
    )
    return resolve_attention(section.attention, device, traits)


def head_dim(model_config: Any) -> int | None:
    """Dimensions of an attention head; None for a model that does not say."""
    text = model_config.get_text_config()
    found = getattr(text, "head_dim", None)
    if found is None and getattr(text, "num_attention_heads", None):
        found = text.hidden_size // text.num_attention_heads
    return found


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
