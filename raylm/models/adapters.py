"""What PEFT trains beside frozen weights: low-rank adapters and new rows, put into a model, merged out of it.

New rows are PEFT's trainable tokens: parameters of their own that stand in the place of those rows. The old rows are
in no optimizer, so neither a gradient nor weight decay changes them. The price is a copy of the embedding, and of the
output layer if it is another matrix, in each forward.
"""

import copy
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from raylm.config.sections import ModelSection
from raylm.config.training import LoraSection
from raylm.errors import ModelError
from raylm.models.load import load_model
from raylm.models.vocabulary import NEW_ROWS, new_rows

logger = logging.getLogger(__name__)


def add_lora(model: Any, section: LoraSection, *, seed: int) -> Any:
    """The model with adapters in its linear modules; only they, and its new rows, require gradients.

    Raises ModelError when a name in the section matches no module that can be meant.
    """
    from peft import LoraConfig, get_peft_model

    rows = new_rows(model.config)
    if rows and not section.new_rows:
        logger.warning("lora.new_rows=false: the %d tokens that are new to this model will not be learnt", len(rows))
    check_lora(model, section)
    torch.manual_seed(seed)  # lora_A is drawn at random, alike on all ranks
    targets = section.target_modules if isinstance(section.target_modules, str) else list(section.target_modules)
    trained = {name: list(rows) for name in _row_layers(model)} if rows and section.new_rows else None
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=section.rank,
            lora_alpha=section.alpha,
            lora_dropout=section.dropout,
            target_modules=targets,
            use_rslora=section.use_rslora,
            use_dora=section.use_dora,
            rank_pattern=dict(section.rank_pattern),
            alpha_pattern=dict(section.alpha_pattern),
            modules_to_save=list(section.modules_to_save) or None,
            trainable_token_indices=trained,
            task_type="CAUSAL_LM",
        ),
    )
    learns, total = adapted.get_nb_trainable_parameters()
    logger.info("LoRA trains %s of %s parameters (%.2f %%)", f"{learns:,}", f"{total:,}", 100 * learns / total)
    return adapted


def check_lora(model: Any, section: LoraSection) -> None:
    """Raises ModelError when a name in the section matches no module that can be meant; needs no weights."""
    if section.target_modules != "all-linear":
        _check_targets(model, section.target_modules)
    _check_patterns(model, section)


def add_new_rows(model: Any) -> Any:
    """The model with only the rows of its new tokens requiring gradients. Raises ModelError when there are none."""
    from peft import TrainableTokensConfig, get_peft_model

    rows = check_new_rows(model.config, model.name_or_path)
    config = TrainableTokensConfig(target_modules=_row_layers(model), token_indices=list(rows), task_type="CAUSAL_LM")
    with warnings.catch_warnings():  # PEFT warns of tied layers in general, though it ties these rows
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        return get_peft_model(model, config)


def load_adapted(section: ModelSection, adapter: Path, *, num_tokens: int) -> Any:
    """A base model in fp32 on the CPU with an adapter merged into its weights.

    num_tokens: of the tokenizer beside the adapter; a base with fewer rows, which is what it was before its vocabulary
    was extended, gets the rows that the adapter holds. Raises ModelError when the adapter does not hold all of them, or
    is of another model.
    """
    from peft import PeftConfig, PeftModel

    peft_config = PeftConfig.from_pretrained(str(adapter))
    model = load_model(section, torch.device("cpu"))
    num_rows = model.get_input_embeddings().weight.shape[0]
    if num_tokens > num_rows:
        added = range(num_rows, num_tokens)
        if not all(set(added) <= held for held in _rows_in(peft_config, _row_layers(model), num_tokens)):
            raise ModelError(
                str(adapter),
                f"was trained with {num_tokens} tokens and does not hold the rows from {num_rows} on, which "
                f"{section.path} lacks.",
                "Name the extended model as the base.",
            )
        model.resize_token_embeddings(num_tokens, mean_resizing=False)
        setattr(model.config, NEW_ROWS, [added.start, len(added)])
    try:
        return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(str(adapter), f"does not fit {section.path}: {reason}", "Name the base it is of.") from None


def _rows_in(peft_config: Any, layers: list[str], num_tokens: int) -> list[set[int]]:
    """The rows of each layer that an adapter holds: some (a list is of the embedding), or all as a saved module."""
    listed = getattr(peft_config, "trainable_token_indices", None) or {}
    rows = {layers[0]: listed} if isinstance(listed, list) else listed
    whole = getattr(peft_config, "modules_to_save", None) or ()
    held = []
    for layer in layers:
        found = {number for name, numbers in rows.items() if layer.endswith(name) for number in numbers}
        held.append(set(range(num_tokens)) if any(layer.endswith(name) for name in whole) else found)
    return held


def check_new_rows(model_config: Any, name: str) -> range:
    """The new rows of a model. Raises ModelError when its configuration names none."""
    rows = new_rows(model_config)
    if rows is None:
        raise ModelError(name, "has no new rows.", "Make some with raylm vocab extend, or set training.method=full.")
    return rows


def output_layer(causal: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of a model's output layer, with the rows that are being trained in their places."""
    head = causal.get_output_embeddings()
    rows = getattr(head, "token_adapter", head)
    if hasattr(rows, "get_merged_weights"):  # PEFT's `weight` is the frozen one
        return rows.get_merged_weights(rows.active_adapters), None
    return head.weight, getattr(head, "bias", None)


def base_of(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def merged(model: Any) -> Any:
    """A copy of a PEFT model's transformers model with the adapters added into its weights, in the weights' dtype."""
    return copy.deepcopy(model).merge_and_unload()


def _row_layers(model: Any) -> list[str]:
    """Names of the modules whose rows are tokens: the embedding and, where it is not tied, the output layer."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ModelError(
            model.name_or_path,
            "its output layer has a bias, with which new rows cannot be trained alone.",
            "Set training.method=full, or lora.new_rows=false.",
        )
    layers = [embedding] if head.weight is embedding.weight else [embedding, head]
    return [name for layer in layers for name, module in model.named_modules() if module is layer]


def _check_patterns(model: Any, section: LoraSection) -> None:
    named = dict(model.named_modules())
    linear = [name for name, module in named.items() if isinstance(module, torch.nn.Linear)]
    for key, patterns in (("rank_pattern", section.rank_pattern), ("alpha_pattern", section.alpha_pattern)):
        for pattern in patterns:
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in linear):
                raise ModelError(f"lora.{key}", f"{pattern} matches no linear module of the model.")
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    for target in section.modules_to_save:
        found = [module for name, module in named.items() if name == target or name.endswith(f".{target}")]
        if not found:
            raise ModelError("lora.modules_to_save", f"{target} matches no module of the model.")
        if tied and any(module in (model.get_input_embeddings(), model.get_output_embeddings()) for module in found):
            raise ModelError(
                "lora.modules_to_save",
                f"{target} is tied: embedding and output layer are one matrix, which a copy would part.",
                "Leave it out, or set training.method=full.",
            )


def _check_targets(model: Any, names: tuple[str, ...]) -> None:
    head = model.get_output_embeddings()
    output = next((name for name, module in model.named_modules() if module is head), "")
    if any(output == target or output.endswith(f".{target}") for target in names):
        raise ModelError(
            "lora.target_modules",
            f"{output} is the output layer, which the loss runs without adapters.",
            "Leave it out; training.method=full trains it.",
        )
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    missing = [target for target in names if not any(n == target or n.endswith(f".{target}") for n in linear)]
    if missing:
        known = sorted({name.rsplit(".", 1)[-1] for name in linear - {output}})
        raise ModelError(
            "lora.target_modules",
            f"{', '.join(missing)} match no linear module of the model.",
            f"Its linear modules are {', '.join(known)}.",
        )
