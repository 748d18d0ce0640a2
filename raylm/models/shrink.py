"""A smaller model of the same family and vocabulary: some of a model's blocks, or a new one of a given width."""

import copy
from collections.abc import Sequence
from typing import Any

import torch

from raylm.errors import ModelError
from raylm.models.blocks import decoder_blocks


def evenly_spaced(num_layers: int, count: int) -> tuple[int, ...]:
    """`count` of the layers 0 … num_layers - 1, the first and the last among them; of one layer, the first."""
    if count == 1:
        return (0,)
    return tuple(round(place * (num_layers - 1) / (count - 1)) for place in range(count))


def check_layers(model_config: Any, layers: Sequence[int], name: str) -> None:
    """Raises ModelError for a layer that the model does not have, or one that is named twice or out of order."""
    total = model_config.get_text_config().num_hidden_layers
    outside = [layer for layer in layers if not 0 <= layer < total]
    if outside:
        raise ModelError(
            "layers", f"{outside[0]} is not one of the {total} layers of {name}.", f"Use 0 to {total - 1}."
        )
    if list(layers) != sorted(set(layers)):
        raise ModelError("layers", f"{list(layers)} are not in order, each once.", "Sort them.")


def take_layers(model: Any, layers: Sequence[int]) -> Any:
    """A model with these blocks of `model`, and with its embeddings, final norm and output layer. Tensors are shared.

    Raises ModelError for a model whose blocks are not found.
    """
    blocks = decoder_blocks(model)
    prefix = next(name for name, module in model.named_modules() if module is blocks) + "."
    config = _with_layers(model.config, layers)
    with torch.device("meta"):
        small = type(model)(config)
    places = {old: new for new, old in enumerate(layers)}
    state = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith(prefix):
            state[name] = tensor
            continue
        number, _, rest = name.removeprefix(prefix).partition(".")
        if int(number) in places:
            state[f"{prefix}{places[int(number)]}.{rest}"] = tensor
    return _filled(small, state, model)


def narrower_config(model_config: Any, *, hidden_size: int, num_layers: int, name: str) -> Any:
    """The configuration of a model of another width: heads as wide as before, the rest in proportion.

    Raises ModelError for a width that is no multiple of a head's.
    """
    config = _with_layers(model_config, evenly_spaced(model_config.get_text_config().num_hidden_layers, num_layers))
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if hidden_size % head:
        raise ModelError("hidden_size", f"{hidden_size} is not a multiple of {head}, the width of a head of {name}.")
    share = hidden_size / text.hidden_size
    heads = hidden_size // head
    wanted = max(1, round(text.num_key_value_heads * share))
    text.num_key_value_heads = max(count for count in range(1, wanted + 1) if heads % count == 0)
    text.intermediate_size = max(32, round(text.intermediate_size * share / 32) * 32)
    text.hidden_size, text.num_attention_heads = hidden_size, heads
    return config


def new_model(kind: type, model_config: Any, *, seed: int) -> Any:
    """A model of a transformers class with random weights. kind: of the model it is to draft for."""
    torch.manual_seed(seed)
    return kind(model_config)


def _with_layers(model_config: Any, layers: Sequence[int]) -> Any:
    """A copy of a configuration, with lists that have a member for each layer cut to these."""
    config = copy.deepcopy(model_config)
    text = config.get_text_config()
    total = text.num_hidden_layers
    for key, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == total and key != "architectures":
            setattr(text, key, [value[layer] for layer in layers])
    text.num_hidden_layers = len(layers)
    return config


def _filled(small: Any, state: dict[str, torch.Tensor], model: Any) -> Any:
    """A model made on the meta device, with these tensors, and with the buffers that no state holds."""
    small.load_state_dict(state, assign=True, strict=False)
    small.tie_weights()
    sources = dict(model.named_buffers())
    for name, buffer in list(small.named_buffers()):
        if buffer.is_meta:
            parent, _, last = name.rpartition(".")
            small.get_submodule(parent).register_buffer(last, sources[name].clone(), persistent=False)
    missing = [name for name, tensor in small.state_dict().items() if tensor.is_meta]
    assert not missing, missing
    small.generation_config = model.generation_config
    return small.eval()
