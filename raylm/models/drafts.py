"""What drafts for a model in speculative decoding: checked against the model before an engine starts, and named to it.

A draft model proposes ids of its own vocabulary, so an id must mean the same text in both. Where one vocabulary is
longer, by padding or by tokens of its own, vLLM can be told to draft only tokens that both have.
"""

import importlib.util
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raylm.config.speculation import SPECULATION_METHODS, SpeculationSection
from raylm.errors import ConfigError, ModelError
from raylm.models.folder import PACKAGE_PREFIX, as_folder, is_adapter, locate

logger = logging.getLogger(__name__)

WORKER_REPAIR = "raylm.models.vllm_cpu.CpuRepair"
"""vLLM's `worker_extension_cls` without GPU, where no other is set; speculation samples wrongly without it."""
_WHERE = "speculation.model"
_EAGLE3_LEAST_LAYERS = 7
# Under which of these a configuration counts the layers for multi-token prediction.
_MTP_KEYS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules", "mtp_config")


def check_set_once(section: SpeculationSection | None, engine: Mapping[str, Any], *, use_gpu: bool = True) -> None:
    """Raises ConfigError where speculation is set twice, or what it needs of the engine is set otherwise.

    engine: vLLM's own arguments, as the user gave them; use_gpu: true as long as it is not known.
    """
    if section is not None:
        for key in ("speculative_config", "worker_extension_cls"):
            if key in engine:
                raise ConfigError(f"engine.{key}", "excludes speculation.", "Drop one of the two.")
    elif not use_gpu and engine.get("speculative_config") and "worker_extension_cls" in engine:
        raise ConfigError(
            "engine.worker_extension_cls",
            "takes the place of what engine.speculative_config needs without GPU.",
            "Drop one of the two.",
        )


def engine_options(
    section: SpeculationSection | None,
    target: str,
    *,
    use_gpu: bool,
    max_model_len: int | None = None,
    engine: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """vLLM's engine arguments for speculation, and for what its CPU engine needs repaired.

    engine: vLLM's own arguments, as the user gave them; those are not repeated here. Raises ConfigError as
    `check_set_once`; further arguments and errors as for `speculative_config`.
    """
    engine = engine or {}
    check_set_once(section, engine, use_gpu=use_gpu)
    found: dict[str, Any] = {}
    if section is not None:
        settings = speculative_config(section, target, use_gpu=use_gpu, max_model_len=max_model_len)
        found["speculative_config"] = settings
    if not use_gpu and "worker_extension_cls" not in engine:
        found["worker_extension_cls"] = WORKER_REPAIR
    return found


def speculative_config(
    section: SpeculationSection, target: str, *, use_gpu: bool, max_model_len: int | None = None
) -> dict[str, Any]:
    """vLLM's `speculative_config` for a model.

    target: hub id or folder of the model, as `as_folder` gave it; max_model_len: tokens a request may have, by default
    the model's own. What lies on the hub is left to vLLM. Raises ModelError where the draft does not fit the model, and
    where the method does not run here.
    """
    row = section.row
    if not (use_gpu or row.on_cpu):
        others = ", ".join(name for name, other in SPECULATION_METHODS.items() if other.on_cpu)
        raise ModelError("speculation.method", f"{section.method} needs a GPU.", f"Choose one of {others}.")
    if row.package and importlib.util.find_spec(row.package) is None:
        name = row.package.replace("_", "-")
        raise ModelError("speculation.method", f"{section.method} needs the package {name}.", f"pip install {name}")
    config = _read_config(target)
    if row.drafter == "target" and config and not any(_text(config).get(key) or config.get(key) for key in _MTP_KEYS):
        raise ModelError(
            "speculation.method",
            f"{section.method} needs a model with layers for multi-token prediction, and {target} has none.",
            "Set speculation.method=ngram, or draft_model with a draft.",
        )
    if section.model is None:
        return section.engine_settings(use_gpu=use_gpu)
    draft = as_folder(section.model)
    settings = section.engine_settings(draft, use_gpu=use_gpu)
    if not Path(draft).is_dir():
        return settings
    if is_adapter(draft):
        raise ModelError(
            _WHERE, f"{section.model} is a LoRA adapter, not a whole model.", "Merge it: raylm adapter merge"
        )
    drafter = _read_config(draft)
    if not config:
        return settings
    if row.drafter == "model":
        if _vocabularies_differ_in_length(section.model, draft, drafter, target, config):
            settings["use_heterogeneous_vocab"] = True
        _warn_of_few_positions(section.model, drafter, config, max_model_len)
    else:
        _check_hidden_size(section.model, drafter, target, config)
        if section.method == "eagle3":
            _check_layers(section.model, drafter, target, config)
    return settings


def portable(section: SpeculationSection) -> SpeculationSection:
    """The section as a process with another working directory reads it: the path of the draft is absolute."""
    if section.model is None or section.model.startswith(PACKAGE_PREFIX):
        return section
    return section.model_copy(update={"model": locate(section.model).path})


def _vocabularies_differ_in_length(
    name: str, draft: str, drafter: Mapping[str, Any], target: str, config: Mapping[str, Any]
) -> bool:
    """Raises ModelError when an id is one text in the draft's tokenizer and another in the model's."""
    ours, theirs = _texts(target), _texts(draft)
    if ours is not None and theirs is not None:
        clash = sorted(number for number in ours.keys() & theirs.keys() if ours[number] != theirs[number])
        if clash:
            first = clash[0]
            raise ModelError(
                _WHERE,
                f"{name} has another vocabulary than {target}: {len(clash)} ids differ, such as {first}, which is "
                f"{theirs[first]!r} there and {ours[first]!r} here.",
                "Give a draft with the model's tokenizer; raylm distill-draft makes one.",
            )
    rows, wanted = _text(drafter).get("vocab_size"), _text(config).get("vocab_size")
    if rows == wanted:
        return False
    if theirs is None or ours is None:
        raise ModelError(
            _WHERE,
            f"{name} has {rows} rows and {target} {wanted}, and not both have a tokenizer.json to compare.",
            "Copy the tokenizer's files into the draft's folder.",
        )
    logger.info("%s has %s rows and %s %s: only tokens that both have are drafted", name, rows, target, wanted)
    return True


def _warn_of_few_positions(
    name: str, drafter: Mapping[str, Any], config: Mapping[str, Any], max_model_len: int | None
) -> None:
    reach, longest = _positions(drafter), max_model_len or _positions(config)
    if reach is not None and longest is not None and reach < longest:
        logger.warning(
            "%s: %s has %d positions and requests may have %d tokens: nothing is drafted while a longer one runs. "
            "Set max_model_len=%d, or give a draft with more.",
            *(_WHERE, name, reach, longest, reach),
        )


def _check_hidden_size(name: str, drafter: Mapping[str, Any], target: str, config: Mapping[str, Any]) -> None:
    takes = drafter.get("target_hidden_size", drafter.get("hidden_size"))
    gives = _text(config).get("hidden_size")
    if takes is not None and gives is not None and takes != gives:
        raise ModelError(
            _WHERE,
            f"{name} reads hidden states of {takes} numbers, and those of {target} have {gives}.",
            "Give a head that was trained for this model.",
        )


def _check_layers(name: str, drafter: Mapping[str, Any], target: str, config: Mapping[str, Any]) -> None:
    """EAGLE-3 reads after three layers: where the head does not say which, vLLM takes the third, that in the middle and
    the last but two, which must differ."""
    own = drafter.get("eagle_aux_hidden_state_layer_ids") or drafter.get("eagle_config")
    layers = _text(config).get("num_hidden_layers")
    if not own and layers is not None and layers < _EAGLE3_LEAST_LAYERS:
        raise ModelError(
            _WHERE,
            f"{name} reads hidden states after three layers, which vLLM takes from models of {_EAGLE3_LEAST_LAYERS} "
            f"layers and more; {target} has {layers}.",
            "Set speculation.method=ngram, or draft_model with a draft.",
        )


def _texts(folder: str) -> dict[int, str] | None:
    """Token ids and their texts, those of added tokens too; None without a tokenizer.json."""
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        return None
    from tokenizers import Tokenizer

    return {number: text for text, number in Tokenizer.from_file(str(file)).get_vocab().items()}


def _positions(config: Mapping[str, Any]) -> int | None:
    """Tokens that the positions reach; None where the configuration does not say, or scales them."""
    text = _text(config)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    plain = rope.get("rope_type", rope.get("type", "default")) == "default"
    return text.get("max_position_embeddings") if plain else None


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("text_config", config)


def _read_config(folder: str) -> dict[str, Any]:
    """config.json of a folder; empty for a hub id. Raises ModelError when it is no JSON."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        return {}
    try:
        tree: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(str(file), f"is not valid JSON: {error}.", "Copy the model folder again.") from None
    return tree
