"""What the model will see of a dataset: rendered rows with the tokens that carry loss marked."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from raylm.config.data import DataSection
from raylm.data.schema import RowProblem, conversation_from_json
from raylm.data.sources import list_files, read_file
from raylm.data.templates import ChatTemplate
from raylm.data.tokenize import tokenize_segments


@dataclass(frozen=True, slots=True)
class PreviewRow:
    """One row: tokens in order, each as (id, text, carries loss); or the problem it is rejected for."""

    file: str
    index: int
    tokens: list[tuple[int, str, bool]]
    problem: str = ""


def preview_rows(section: DataSection, tokenizer: Any, name: str, *, count: int) -> Iterator[PreviewRow]:
    """The first `count` rows of data.train, as training would use them. Raises DataError and ModelError."""
    template = ChatTemplate(tokenizer, name)
    shown = 0
    for path in list_files(section.train):
        for row in read_file(path, section.role_map):
            if shown == count:
                return
            shown += 1
            if row.conversation is None:
                yield PreviewRow(path, row.index, [], row.problem)
                continue
            try:
                segments = template.render(conversation_from_json(row.conversation)["messages"])
            except RowProblem as fault:
                yield PreviewRow(path, row.index, [], " ".join(filter(None, (fault.problem, fault.remedy))))
                continue
            tokens = tokenize_segments(tokenizer, [segments])[0]
            ids = tokens.input_ids.tolist()
            pairs = zip(ids, tokens.loss_mask.tolist(), strict=True)
            yield PreviewRow(path, row.index, [(i, tokenizer.decode([i]), bool(loss)) for i, loss in pairs])
