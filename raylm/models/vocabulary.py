"""A model with more rows in its embedding and output layer, and which rows those are.

A new row is the mean of the rows of the old tokens that its text was made of, so that before any training a new token
means about what its parts did. Rows without a token are never made: nothing in a folder keeps an engine from sampling
one. A linear output layer has no row whose logit is low for every state, vLLM does not read `suppress_tokens`, and it
samples from all `vocab_size` rows. (It pads the layer by itself, in memory, where it masks the padding.)

The configuration of the model says which rows are new, under a key that transformers and vLLM pass over:
`"raylm_new_rows": [first, number]`. It stays in exports, so training can go on with the rows.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from raylm.config.sections import ModelSection
from raylm.errors import ModelError
from raylm.models.export import complete_folder
from raylm.models.load import load_config

NEW_ROWS = "raylm_new_rows"
NOTICES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")


def new_rows(model_config: Any) -> range | None:
    """The rows that vocabulary extension added to a model, by its configuration; None when there are none."""
    value = getattr(model_config, NEW_ROWS, None)
    return range(value[0], value[0] + value[1]) if value else None


def num_rows_needed(num_rows: int, num_tokens: int, multiple: int | None) -> int:
    """Rows for num_tokens tokens in a model that has num_rows, as a multiple of `multiple`."""
    rows = max(num_rows, num_tokens)
    return rows if multiple is None else -(-rows // multiple) * multiple


def num_rows_of(section: ModelSection) -> int:
    """Rows of the embedding by the model's configuration. Raises ModelError for models that cannot be extended."""
    config = load_config(section)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(section.path, "is quantised, and its rows cannot be changed.", "Extend the original model.")
    return int(config.get_text_config().vocab_size)


@torch.no_grad()
def extend_rows(model: Any, parts: Mapping[int, Sequence[int]], *, num_rows: int) -> None:
    """Gives a model `num_rows` rows, and each new token the mean of its parts' rows; all other rows stay as they are.

    parts: new id -> ids of old tokens, for every row that is new; none, where the old tokenizer could not spell the
    text, stand for all old rows. Embedding, output layer and its bias alike; what was tied stays tied. Raises
    ModelError when embedding and output layer have unequal numbers of rows.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    before = embedding.weight.shape[0]
    if head is None or head.weight.shape[0] != before:
        raise ModelError(
            model.name_or_path, "has no output layer with a row for each row of the embedding: it cannot be extended."
        )
    assert set(range(before, num_rows)) <= parts.keys(), "a row without a token"
    if num_rows > before:
        model.resize_token_embeddings(num_rows, mean_resizing=False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tensors = {tensor.data_ptr(): tensor for tensor in (embedding.weight, head.weight)}
    if getattr(head, "bias", None) is not None:
        tensors[head.bias.data_ptr()] = head.bias
    everything = range(min(parts))
    for tensor in tensors.values():
        for number, old in parts.items():
            tensor[number] = tensor[list(old or everything)].float().mean(0).to(tensor.dtype)
    known = new_rows(model.config)
    first = known.start if known else min(parts)
    setattr(model.config, NEW_ROWS, [first, max(parts) + 1 - first])


def write_model(model: Any, source: str, target: Path, write_tokenizer: Callable[[Path], None]) -> None:
    """Writes a folder for transformers, vLLM and raylm, complete or not at all; notices of the source come along.

    write_tokenizer: puts the tokenizer's files into a folder.
    """
    with complete_folder(target) as scratch:
        model.save_pretrained(scratch)
        write_tokenizer(scratch)
        if Path(source).is_dir():
            for pattern in NOTICES:
                for file in Path(source).glob(pattern):
                    shutil.copy(file, scratch / file.name)


def check_output(target: Path) -> None:
    """Raises ModelError when the folder exists and is not empty."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(str(target), "exists and is not an empty folder.", "Choose another output.")
