"""What the model will see of a dataset: rendered rows with the tokens that carry loss marked."""

from collections.abc import Iterator
from dataclasses import dataclass

from raylm.config.data import DataSection
from raylm.data.encode import Encoder
from raylm.data.rows import iterate_rows
from raylm.data.schema import RowProblem
from raylm.data.sources import list_files
from raylm.data.store import TokenizerSource, row_tokenizer


@dataclass(frozen=True, slots=True)
class PreviewRow:
    """One row: tokens in order, each as (id, text, carries loss); or the problem it is rejected for."""

    where: str
    tokens: list[tuple[int, str, bool]]
    problem: str = ""


def preview_rows(section: DataSection, source: TokenizerSource, *, count: int) -> Iterator[PreviewRow]:
    """The first `count` rows of data.train, as training would see them before truncation.

    Raises DataError and ModelError.
    """
    tokenizer = source.load()
    rows = row_tokenizer(list_files(section.train), section, source)
    encoder = Encoder(tokenizer)
    for shown, found in enumerate(iterate_rows(section.train, section.role_map)):
        if shown == count:
            return
        if found.row is None:
            yield PreviewRow(found.where, [], found.problem)
            continue
        try:
            tokens = encoder.encode([rows.segments(found.row, found.number)])[0]
        except RowProblem as fault:
            yield PreviewRow(found.where, [], str(fault))
            continue
        if isinstance(tokens, RowProblem):
            yield PreviewRow(found.where, [], str(tokens))
            continue
        ids = tokens.input_ids.tolist()
        pairs = zip(ids, tokens.loss_mask.tolist(), strict=True)
        yield PreviewRow(found.where, [(i, tokenizer.decode([i]), bool(loss)) for i, loss in pairs])
