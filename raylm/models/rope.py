"""Position interpolation: rotary frequencies for contexts longer than a model was trained on.

The scaling is written into the model's configuration, in the form that transformers and vLLM both read, so the exported
folder says what was trained. Both multiply `max_position_embeddings` by the factor for `linear` and `dynamic`, and take
it as scaled already for the rest.
"""

from typing import Any

from raylm.config.sections import RopeSection
from raylm.errors import ModelError

_COUNTED_BY_READERS = ("linear", "dynamic")


def scale_rope(model_config: Any, section: RopeSection, name: str) -> None:
    """Writes the scaling into a transformers configuration, in place of one it may have; name: of the model.

    Raises ModelError for a model without rotary positions, or with a set of them for each kind of layer.
    """
    config = model_config.get_text_config()
    before = getattr(config, "rope_parameters", None)
    if not before:
        raise ModelError(name, "has no rotary positions to scale.", "Drop model.rope.")
    if "rope_theta" not in before:
        raise ModelError(name, "has rotary positions of its own for each kind of layer.", "Drop model.rope.")
    original = section.original_max_position_embeddings or original_positions(config)
    kept = {key: before[key] for key in ("rope_theta", "partial_rotary_factor") if key in before}
    extended = round(original * section.factor)
    config.max_position_embeddings = original if section.type in _COUNTED_BY_READERS else extended
    if section.type == "ntk":
        theta = _ntk_theta(kept["rope_theta"], section.factor, _rotary_dim(config, kept))
        config.rope_parameters = {**kept, "rope_type": "default", "rope_theta": theta}
        return
    options: dict[str, Any] = {"rope_type": section.type, "factor": section.factor}
    if section.type == "yarn":
        options |= {"beta_fast": section.beta_fast, "beta_slow": section.beta_slow}
    if section.type == "llama3":
        options |= {"low_freq_factor": section.low_freq_factor, "high_freq_factor": section.high_freq_factor}
    if section.type not in _COUNTED_BY_READERS:
        options["original_max_position_embeddings"] = original
    config.rope_parameters = {**kept, **options}


def max_positions(model_config: Any) -> int | None:
    """Tokens that a model's positions reach, its scaling counted; None where the configuration names no limit."""
    config = model_config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    parameters = getattr(config, "rope_parameters", None) or {}
    if limit is not None and parameters.get("rope_type") in _COUNTED_BY_READERS:
        return round(limit * parameters["factor"])
    return limit


def original_positions(config: Any) -> int:
    """Tokens that a model was trained on before any scaling, by its configuration."""
    parameters = config.rope_parameters
    if parameters.get("rope_type") in (None, "default", *_COUNTED_BY_READERS):
        return int(config.max_position_embeddings)
    return int(parameters.get("original_max_position_embeddings") or config.max_position_embeddings)


def _ntk_theta(theta: float, factor: float, dim: int) -> float:
    """The base at which the lowest frequency is that of linear scaling, and the highest stays as it is.

    Source: arXiv:2309.00071, section 3.1 (NTK-aware interpolation).
    """
    return float(theta * factor ** (dim / (dim - 2)))


def _rotary_dim(config: Any, parameters: dict[str, Any]) -> int:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(head_dim * parameters.get("partial_rotary_factor", 1.0))
