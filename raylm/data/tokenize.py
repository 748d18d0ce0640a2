"""Rows into token ids and loss masks, a whole Arrow batch at a time.

Ids are those of the whole rendering, as a server would make them; the loss mask comes from character offsets. A token
that straddles the border of an answer carries no loss: in serving its first part belongs to the prompt.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raylm.data.schema import RowProblem, conversation_from_json
from raylm.data.templates import ChatTemplate, Segment

TOKENS_SCHEMA = pa.schema(
    [
        ("file", pa.int32()),
        ("index", pa.int64()),
        ("input_ids", pa.large_list(pa.int32())),
        ("loss_mask", pa.large_list(pa.bool_())),
        ("length", pa.int32()),
        ("loss_tokens", pa.int32()),
        ("reason", pa.string()),
        ("problem", pa.string()),
    ]
)
"""`reason` names why a row is not used ("" when it is): malformed, too_long, no_loss; `problem` is the sentence."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """input_ids: (n,) int32; loss_mask: (n,) bool, True where the token is predicted and counts."""

    input_ids: np.ndarray
    loss_mask: np.ndarray


def tokenize_segments(tokenizer: Any, rows: list[list[Segment]]) -> list[Tokens]:
    """Token ids and loss masks of rendered conversations, all in one call of the fast tokenizer.

    The rendering holds its own BOS, so the tokenizer adds no special tokens. The first token of a row never carries
    loss: nothing predicts it.
    """
    texts = ["".join(segment.text for segment in segments) for segments in rows]
    encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return [_with_loss(encoding, segments) for encoding, segments in zip(encodings, rows, strict=True)]


def tokenize_table(table: pa.Table, template: ChatTemplate, tokenizer: Any, *, max_seq_len: int) -> pa.Table:
    """Columns file, index, conversation, problem -> TOKENS_SCHEMA, row for row: nothing is lost here, only marked."""
    problems = [problem or "" for problem in table["problem"].to_pylist()]
    reasons = ["malformed" if problem else "" for problem in problems]
    segments: list[list[Segment]] = []
    for position, text in enumerate(table["conversation"].to_pylist()):
        segments.append([])
        if problems[position]:
            continue
        try:
            segments[-1] = template.render(conversation_from_json(text)["messages"])
        except RowProblem as fault:
            reasons[position] = "malformed"
            problems[position] = " ".join(filter(None, (fault.problem, fault.remedy)))
    tokens = tokenize_segments(tokenizer, segments)
    for position, row in enumerate(tokens):
        if not reasons[position]:
            reasons[position], problems[position] = _usable(row, max_seq_len)
        if reasons[position]:
            tokens[position] = Tokens(row.input_ids[:0], row.loss_mask[:0])
    return _to_arrow(table, tokens, reasons, problems)


def _with_loss(encoding: Any, segments: list[Segment]) -> Tokens:
    input_ids = np.asarray(encoding.ids, dtype=np.int32)
    loss_mask = np.zeros(len(input_ids), dtype=bool)
    if len(input_ids) == 0:
        return Tokens(input_ids, loss_mask)
    offsets = np.asarray(encoding.offsets, dtype=np.int64)
    start = 0
    for segment in segments:
        end = start + len(segment.text)
        if segment.loss:
            loss_mask |= (offsets[:, 0] >= start) & (offsets[:, 1] <= end) & (offsets[:, 1] > offsets[:, 0])
        start = end
    loss_mask[0] = False
    return Tokens(input_ids, loss_mask)


def _usable(row: Tokens, max_seq_len: int) -> tuple[str, str]:
    if len(row.input_ids) > max_seq_len:
        return "too_long", f"has {len(row.input_ids)} tokens, more than data.max_seq_len={max_seq_len}."
    if not row.loss_mask.any():
        return "no_loss", "has no token that carries loss."
    return "", ""


def _to_arrow(table: pa.Table, tokens: list[Tokens], reasons: list[str], problems: list[str]) -> pa.Table:
    lengths = np.array([len(row.input_ids) for row in tokens], dtype=np.int32)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), pa.int64())
    ids = np.concatenate([row.input_ids for row in tokens]) if tokens else np.zeros(0, np.int32)
    masks = np.concatenate([row.loss_mask for row in tokens]) if tokens else np.zeros(0, bool)
    return pa.table(
        [
            table["file"].combine_chunks(),
            table["index"].combine_chunks(),
            pa.LargeListArray.from_arrays(offsets, pa.array(ids, pa.int32())),
            pa.LargeListArray.from_arrays(offsets, pa.array(masks, pa.bool_())),
            pa.array(lengths, pa.int32()),
            pa.array([int(row.loss_mask.sum()) for row in tokens], pa.int32()),
            pa.array(reasons, pa.string()),
            pa.array(problems, pa.string()),
        ],
        schema=TOKENS_SCHEMA,
    )
