"""What an adapter folder holds, read without loading it, and whether vLLM can serve that beside its base.

vLLM finds some faults only in a forward pass, or never: an adapter with smaller matrices than the base's is copied into
a corner of them, modules that the base lacks are passed over, whole embeddings are dropped. So names and shapes are
held against the base's own here, from the header of the safetensors file. The price is that adapters on embeddings,
output layers and experts in one tensor, some of which vLLM could serve, must be merged as well.
"""

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from raylm.errors import ModelError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILES = ("adapter_model.bin", "adapter_model.pt")
SERVABLE_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `max_lora_rank` may be."""

Shape = tuple[int, ...]

_MERGE = "Merge it (raylm adapter merge ADAPTER --output MODEL) and serve the result."
_COPY = "Copy the adapter folder again."
_MAX_HEADER_BYTES = 100 * 2**20
# Initialisations that leave the base's weights alone; the others (PiSSA, OLoRA, LoftQ, …) change them.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_FEATURES = {
    "use_dora": "uses DoRA",
    "modules_to_save": "holds whole modules (modules_to_save)",
    "trainable_token_indices": "holds rows of new tokens (trainable_token_indices)",
    "lora_bias": "has biases (lora_bias)",
    "alora_invocation_tokens": "is an activated LoRA (alora_invocation_tokens)",
    "layer_replication": "replicates layers (layer_replication)",
    "target_parameters": "adapts parameters that are no modules (target_parameters)",
    "use_bdlora": "is block-diagonal (use_bdlora)",
    "use_qalora": "uses QALoRA",
}


def servable_rank(rank: int) -> int | None:
    """The smallest rank of vLLM's that holds `rank`; None above the largest."""
    return next((allowed for allowed in SERVABLE_RANKS if allowed >= rank), None)


def read_config(stream: BinaryIO, where: str) -> dict[str, Any]:
    """The adapter's configuration. Raises ModelError."""
    try:
        config = json.loads(stream.read(_MAX_HEADER_BYTES).decode())
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ModelError(where, f"{CONFIG_FILE} is not a JSON object.", _COPY)
    return config


def read_shapes(stream: BinaryIO, where: str, *, num_bytes: int | None = None) -> dict[str, Shape]:
    """Names and shapes of the tensors in a safetensors file, from its header.

    num_bytes: of the whole file, where it is known: a file that ends early is told by it. Raises ModelError.
    """
    broken = ModelError(where, f"{WEIGHTS_FILE} is not a whole safetensors file.", _COPY)
    length = int.from_bytes(stream.read(8), "little")
    if not 2 <= length <= _MAX_HEADER_BYTES:
        raise broken
    try:
        header = json.loads(stream.read(length).decode())
        header.pop("__metadata__", None)
        shapes = {name: tuple(int(size) for size in entry["shape"]) for name, entry in header.items()}
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        raise broken from None
    if num_bytes is not None and num_bytes != 8 + length + end:
        raise broken
    return shapes


def check_folder(folder: str, model: str) -> int:
    """The rank of a local adapter that vLLM serves with `model`, a folder or hub id. Raises ModelError."""
    path = Path(folder).expanduser()
    if not (path / CONFIG_FILE).is_file():
        raise ModelError(folder, f"has no {CONFIG_FILE}, so it is no adapter.", "Give a PEFT adapter folder.")
    if not (path / WEIGHTS_FILE).is_file():
        if any((path / file).is_file() for file in PICKLE_FILES):
            raise pickle_refused(folder)
        raise ModelError(folder, f"has no {WEIGHTS_FILE}.", _COPY)
    with (path / CONFIG_FILE).open("rb") as config, (path / WEIGHTS_FILE).open("rb") as weights:
        shapes = read_shapes(weights, folder, num_bytes=(path / WEIGHTS_FILE).stat().st_size)
        return check_servable(read_config(config, folder), shapes, folder, linear=linear_shapes(model))


def pickle_refused(where: str) -> ModelError:
    """The error for weights that could run code when they are loaded."""
    return ModelError(
        where,
        "has weights in pickle format only, which can run code when loaded.",
        "Save it as safetensors, as PEFT's save_pretrained does.",
    )


def check_servable(
    config: Mapping[str, Any],
    tensors: Mapping[str, Shape],
    where: str,
    *,
    linear: Mapping[str, Shape] | None,
    max_rank: int | None = None,
) -> int:
    """The rank of an adapter that vLLM serves. Raises ModelError, with the remedy, for one that it cannot.

    linear: what `linear_shapes` gave for the base; without it names and shapes are left to vLLM.
    max_rank: None where the limit is still to be chosen.
    """
    _check_features(config, where)
    pairs = _pairs(tensors, where)
    rank = max(_check_module(config, name, pair, where, linear) for name, pair in pairs.items())
    if servable_rank(rank) is None:
        raise ModelError(where, f"its rank {rank} is above {SERVABLE_RANKS[-1]}, the highest vLLM serves.", _MERGE)
    if max_rank is not None and rank > max_rank:
        raise ModelError(
            where,
            f"its rank {rank} is above the {max_rank} that the server was started with.",
            f"Start it with max_adapter_rank={rank}, or merge the adapter.",
        )
    return rank


def linear_shapes(model: str) -> dict[str, Shape] | None:
    """(out_features, in_features) of a causal language model's linear modules by name, the output layer left out.

    model: folder or hub id. None for a model that transformers does not build from its configuration as the text model
    that adapters are trained on.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(model)
        if config.get_text_config() is not config:
            return None
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, TypeError, AttributeError):
        return None
    head = built.get_output_embeddings()
    return {
        name: (module.out_features, module.in_features)
        for name, module in built.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    } or None


def _check_features(config: Mapping[str, Any], where: str) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ModelError(where, f"is of PEFT type {kind}, vLLM serves LORA.", _MERGE)
    for key, problem in _FEATURES.items():
        if config.get(key):
            raise ModelError(where, f"{problem}, which vLLM does not serve.", _MERGE)
    if config.get("bias", "none") != "none":
        raise ModelError(where, f"has biases (bias={config['bias']}), which vLLM does not serve.", _MERGE)
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        raise ModelError(where, f"init_lora_weights={init} changed the base's weights as well.", _MERGE)


def _pairs(tensors: Mapping[str, Shape], where: str) -> dict[str, dict[str, Shape]]:
    """Module name -> {"A": shape, "B": shape}."""
    pairs: dict[str, dict[str, Shape]] = {}
    for name, shape in tensors.items():
        found = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight", name)
        if not found:
            raise ModelError(where, f"holds {name}, which is no low-rank matrix of a linear module.", _MERGE)
        pairs.setdefault(found[1], {})[found[2]] = shape
    for name, pair in pairs.items():
        if len(pair) < 2:
            raise ModelError(where, f"has one of the two matrices of {name} only.", _COPY)
    if not pairs:
        raise ModelError(where, "holds no weights.", _COPY)
    return pairs


def _check_module(
    config: Mapping[str, Any],
    name: str,
    pair: Mapping[str, Shape],
    where: str,
    linear: Mapping[str, Shape] | None,
) -> int:
    """The rank of one module's pair."""
    first, second = pair["A"], pair["B"]
    rank = _rank_of(config, name)
    if len(first) != 2 or len(second) != 2 or math.prod((*first, *second)) == 0:
        raise ModelError(where, f"the matrices of {name} have the shapes {first} and {second}.", _COPY)
    if first[0] != second[1] or first[0] != rank:
        raise ModelError(
            where,
            f"the matrices of {name} have the ranks {first[0]} and {second[1]}, {CONFIG_FILE} says {rank}.",
            _COPY,
        )
    if linear is None or ".experts." in name:
        return rank
    if name not in linear:
        raise ModelError(
            where,
            f"adapts {name}, which is no linear module of the base, or its output layer.",
            f"Serve it beside the model it was trained on ({config.get('base_model_name_or_path')}). {_MERGE}",
        )
    if linear[name] != (second[0], first[1]):
        raise ModelError(
            where,
            f"was made for a {name} of {second[0]} x {first[1]}, the base's is {linear[name][0]} x {linear[name][1]}.",
            f"Serve it beside the model it was trained on ({config.get('base_model_name_or_path')}).",
        )
    return rank


def _rank_of(config: Mapping[str, Any], name: str) -> Any:
    """PEFT's rule: the first key of rank_pattern that is a suffix of the name, else `r`."""
    for pattern, rank in (config.get("rank_pattern") or {}).items():
        with suppress(re.error):
            if re.match(rf"(.*\.)?({pattern})$", name):
                return rank
    return config.get("r")
