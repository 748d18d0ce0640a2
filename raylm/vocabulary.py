"""`raylm vocab extend`: the tokenizer from the data room, the rows from the models room."""

import logging
from dataclasses import dataclass
from pathlib import Path

from raylm.config.vocabulary import VocabularyConfig
from raylm.data.sources import list_files
from raylm.data.texts import iterate_texts
from raylm.data.tokenizer import load_tokenizer
from raylm.data.vocabulary import VocabularyExtension, check_takes_pieces
from raylm.errors import ConfigError, DataError, ModelError
from raylm.models.folder import as_folder
from raylm.models.load import load_as_stored
from raylm.models.vocabulary import (
    check_output,
    extend_rows,
    num_rows_needed,
    num_rows_of,
    write_model,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class VocabularyResult:
    """What was written. tokens: those given, added; pieces: learnt; rows: of the embedding, before and after."""

    output: str
    tokens: int
    pieces: int
    first_new_id: int
    rows_before: int
    rows: int


def run_extension(config: VocabularyConfig) -> VocabularyResult:
    """Extends a tokenizer and its model and writes both. Weights are loaded when all else is known to fit.

    Raises RaylmError.
    """
    output = Path(config.output).expanduser()
    check_output(output)
    list_files(config.corpus, "the setting corpus")
    rows_before = num_rows_of(config.model_section)
    folder = as_folder(config.model, config.revision)
    tokenizer = load_tokenizer(folder, revision=config.revision, trust_remote_code=config.trust_remote_code)
    if config.corpus:
        check_takes_pieces(tokenizer.backend_tokenizer, config.model)
    extension = VocabularyExtension(tokenizer, config.model)
    if extension.first_id > rows_before:
        raise ModelError(
            config.model, f"its tokenizer has ids up to {extension.first_id - 1}, it has {rows_before} rows."
        )
    extension.add_tokens(config.special, special=True)
    extension.add_tokens(config.tokens, special=False)
    if config.corpus:
        _learn(extension, config, rows_before)
    rows = num_rows_needed(rows_before, extension.num_tokens, config.pad_to_multiple_of)
    used = max(rows_before, extension.num_tokens)
    if rows > used:
        raise ConfigError(
            "pad_to_multiple_of",
            f"{used} rows would need {rows - extension.num_tokens} more tokens to become {rows}, and a row without a "
            "token could be sampled.",
            "Give corpus and size to fill the rows with learnt pieces, or leave it out: vLLM pads by itself.",
        )
    logger.info("%s: %d tokens and %d pieces are new", config.model, _num_given(config), extension.num_learnt)
    model = load_as_stored(config.model_section)
    extend_rows(model, {token.id: token.parts for token in extension.added}, num_rows=rows)
    write_model(model, folder, output, extension.save)
    return VocabularyResult(
        str(output), _num_given(config), extension.num_learnt, extension.first_id, rows_before, rows
    )


def _learn(extension: VocabularyExtension, config: VocabularyConfig, rows_before: int) -> None:
    """Learns config.size pieces, and as many more as the multiple takes."""
    assert config.size is not None
    given, multiple = extension.num_tokens, config.pad_to_multiple_of
    rows = num_rows_needed(rows_before, given + config.size, multiple)
    wanted = config.size if rows == max(rows_before, given + config.size) else rows - given
    extension.learn(iterate_texts(config.corpus), min_frequency=config.min_frequency, limit=wanted)
    found = extension.num_learnt
    if found == wanted:
        return
    problem = f"holds {found} pieces that save {config.min_frequency} tokens"
    more = "Give more text, or lower min_frequency"
    if found == 0:
        raise DataError("corpus", f"{problem}.", f"{more}.")
    if multiple is not None:
        below = (given + found) // multiple * multiple - given
        less = (
            f", or set size={below}."
            if below > 0 and given + below >= rows_before
            else ", or leave pad_to_multiple_of out."
        )
        raise DataError("corpus", f"{problem}, {wanted} are needed for {rows} rows.", f"{more}{less}")
    logger.warning("corpus: %s, not %d", problem, config.size)


def _num_given(config: VocabularyConfig) -> int:
    return len(config.tokens) + len(config.special)
