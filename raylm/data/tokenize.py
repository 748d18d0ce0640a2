"""Rows into token ids and loss masks, a whole Arrow batch at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from raylm.data.encode import Encoder, Tokens
from raylm.data.formats import TRAINABLE, ParsedRow
from raylm.data.rows import parse_text
from raylm.data.schema import RowProblem
from raylm.data.templates import ChatTemplate, Segment
from raylm.data.templates.literal import Literals, control_tokens, put_back

TOKENS_SCHEMA = pa.schema(
    [
        ("file", pa.int32()),
        ("index", pa.int64()),
        ("line", pa.int64()),
        ("input_ids", pa.large_list(pa.int32())),
        ("loss_mask", pa.large_list(pa.bool_())),
        ("length", pa.int32()),
        ("loss_tokens", pa.int32()),
        ("straddling", pa.int32()),
        ("reason", pa.string()),
        ("problem", pa.string()),
    ]
)
"""`reason` names why a row is not used ("" when it is): malformed, too_long, no_loss, not_sampled; `problem` is the
sentence. A row that is split gives several."""


@dataclass(frozen=True, slots=True)
class TokenizeOptions:
    """How rows become tokens; every field changes what comes out, so all are part of the cache's address."""

    max_seq_len: int
    loss_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    truncation: Literal["drop", "keep_start", "keep_end", "split"] = "drop"
    allow_special_tokens: bool = False
    role_map: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FileOptions:
    """What a file's rows need: the shape of a row and the template that renders it."""

    format: str
    columns: Mapping[str, str]
    template: ChatTemplate | None
    """None where the model has no template; then only plain text can be used."""


class RowTokenizer:
    """A tokenizer, templates and options: everything between the text of a row and its tokens."""

    def __init__(self, tokenizer: Any, options: TokenizeOptions, files: Sequence[FileOptions]) -> None:
        """files: by the number that a row's `file` holds."""
        self.options = options
        self._files = files
        self._encoder = Encoder(tokenizer)
        self._literals = Literals(() if options.allow_special_tokens else control_tokens(tokenizer))
        self._bos, self._eos = own_bos(tokenizer), tokenizer.eos_token or ""

    def table(self, rows: pa.Table) -> pa.Table:
        """Columns file, index, line, text, format, reason, problem -> TOKENS_SCHEMA. Nothing is lost, only marked."""
        reasons: list[str] = rows["reason"].to_pylist()
        problems: list[str] = rows["problem"].to_pylist()
        files: list[int] = rows["file"].to_pylist()
        texts, forms = rows["text"].to_pylist(), rows["format"].to_pylist()
        parsed: list[ParsedRow | None] = [None] * len(files)
        segments: list[list[Segment]] = [[] for _ in files]
        for place, (file, text, form) in enumerate(zip(files, texts, forms, strict=True)):
            if reasons[place]:
                continue
            try:
                parsed[place] = self.parse(file, text, form)
                segments[place] = self.segments(parsed[place], file)
            except RowProblem as fault:
                reasons[place], problems[place] = "malformed", str(fault)
        places: list[int] = []
        tokens: list[Tokens] = []
        for place, encoded in enumerate(self._encoder.encode(segments)):
            kept, reason, problem = [Tokens(_NO_IDS, _NO_MASK)], reasons[place], problems[place]
            if isinstance(encoded, RowProblem):
                reason, problem = "malformed", str(encoded)
            elif not reason:
                row = parsed[place]
                assert row is not None
                kept, reason, problem = self._fitted(encoded, row, files[place])
            reasons[place], problems[place] = reason, problem
            places += [place] * len(kept)
            tokens += kept
        return _to_arrow(rows, places, tokens, [reasons[p] for p in places], [problems[p] for p in places])

    def parse(self, file: int, text: str, form: str = "") -> ParsedRow:
        """A row's JSON text in its final form; form: what the file says of its rows. Raises RowProblem."""
        return parse_text(text, form, self._files[file], self.options.role_map)

    def segments(self, row: ParsedRow | None, file: int) -> list[Segment]:
        """The rendering of a row with its loss flags. Raises RowProblem."""
        if row is None:
            return []
        if row.kind not in TRAINABLE:
            raise RowProblem(
                f"is a row of kind {row.kind}, which fine-tuning on answers cannot use.",
                "Use a dataset of conversations or texts.",
            )
        if row.kind == "conversation":
            return self._conversation(row.value, file)
        shown, taken = self._literals.taken_out(row.value)
        end = "" if not self._eos else self._eos
        if row.kind == "text":
            rendered = [Segment(self._bos, False), Segment(shown + end, True)]
        else:
            rendered = [Segment(self._bos + shown[0], self.options.loss_on == "all"), Segment(shown[1] + end, True)]
        return put_back(rendered, taken) if taken else [segment for segment in rendered if segment.text]

    def _conversation(self, conversation: Any, file: int) -> list[Segment]:
        template = self._files[file].template
        if template is None:
            raise RowProblem(
                "is a conversation, and the tokenizer has no chat template.", "Set data.template to a preset."
            )
        if not any(message["role"] == "assistant" for message in conversation["messages"]):
            raise RowProblem("has no assistant message, so nothing to train on.")
        shown, taken = self._literals.taken_out(conversation)
        segments = template.render(shown)
        if taken:
            segments = put_back(segments, taken)
        return _with_loss(segments, conversation["messages"], self.options.loss_on)

    def _fitted(self, tokens: Tokens, row: ParsedRow, file: int) -> tuple[list[Tokens], str, str]:
        """The rows that become of one: itself, a shorter one or several; or none with the reason."""
        limit = self.options.max_seq_len
        nothing = [Tokens(_NO_IDS, _NO_MASK)]
        if len(tokens.input_ids) > limit:
            too_long = f"has {len(tokens.input_ids)} tokens, more than data.max_seq_len={limit}."
            shorter = self._shortened(tokens, row, file)
            if not shorter:
                return nothing, "too_long", too_long
            return shorter, "", ""
        if not tokens.loss_mask.any():
            return nothing, "no_loss", "has no token that carries loss."
        return [tokens], "", ""

    def _shortened(self, tokens: Tokens, row: ParsedRow, file: int) -> list[Tokens]:
        limit, how = self.options.max_seq_len, self.options.truncation
        if how == "keep_start" or (how == "keep_end" and row.kind == "text2text"):
            # What follows the last answer token that fits is a piece of a turn that nobody answers.
            last = np.flatnonzero(tokens.loss_mask[:limit])
            end = int(last[-1]) + 1 if len(last) else 0
            return [Tokens(tokens.input_ids[:end], tokens.loss_mask[:end], tokens.straddling)] if end else []
        if how == "split" and row.kind == "text":
            return [part for part in _split(tokens, limit) if part.loss_mask.any()]
        if how == "keep_end" and row.kind == "text":
            ids, mask = tokens.input_ids[-limit:], tokens.loss_mask[-limit:].copy()
            mask[0] = False
            return [Tokens(ids, mask)]
        if how == "keep_end":
            return self._last_turns(row.value, file)
        return []

    def _last_turns(self, conversation: Mapping[str, Any], file: int) -> list[Tokens]:
        """The conversation without its first exchanges, as few as must go; whole turns, the system text kept."""
        messages = conversation["messages"]
        system = messages[:1] if messages[0]["role"] == "system" else []
        turns = messages[len(system) :]
        for start in range(1, len(turns)):
            if turns[start]["role"] != "user":
                continue
            shorter = {**conversation, "messages": [*system, *turns[start:]]}
            try:
                encoded = self._encoder.encode([self._conversation(shorter, file)])[0]
            except RowProblem:
                continue
            if isinstance(encoded, Tokens) and len(encoded.input_ids) <= self.options.max_seq_len:
                return [encoded] if encoded.loss_mask.any() else []
        return []


_NO_IDS = np.zeros(0, np.int32)
_NO_MASK = np.zeros(0, bool)


def _split(tokens: Tokens, limit: int) -> list[Tokens]:
    """Pieces of at most `limit` tokens; each goes on with the last token of the one before, so every token is
    predicted once, and none twice."""
    parts: list[Tokens] = []
    start = 0
    while start < len(tokens.input_ids) - (1 if parts else 0):
        mask = tokens.loss_mask[start : start + limit].copy()
        mask[0] = False
        parts.append(Tokens(tokens.input_ids[start : start + limit], mask))
        start += limit - 1
    return parts


def _with_loss(segments: list[Segment], messages: Sequence[Mapping[str, Any]], loss_on: str) -> list[Segment]:
    """Segments with the loss that the settings and the messages ask for."""
    if loss_on == "all":
        return [Segment(s.text, True, s.generated, s.literal, s.turn) for s in segments]
    silent = {place for place, message in enumerate(messages) if message.get("train") is False}
    if loss_on == "last_assistant":
        last = max((place for place, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
        silent |= set(range(len(messages))) - {last}
    if not silent:
        return segments
    shift = _system_turns(segments, messages)
    return [
        Segment(s.text, False, s.generated, s.literal, s.turn) if s.loss and s.turn + shift in silent else s
        for s in segments
    ]


def _system_turns(segments: list[Segment], messages: Sequence[Mapping[str, Any]]) -> int:
    """What to add to a segment's turn for its place in `messages`: presets count turns without the system message."""
    first = next((s.turn for s in segments if s.turn >= 0), -1)
    place = next((at for at, message in enumerate(messages) if message["role"] == "assistant"), -1)
    return place - first if first >= 0 else 0


def own_bos(tokenizer: Any) -> str:
    """The token that the tokenizer puts before plain text by itself, or empty."""
    ids = tokenizer("a")["input_ids"]
    starts = bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    return str(tokenizer.bos_token) if starts else ""


def _to_arrow(
    rows: pa.Table, places: list[int], tokens: list[Tokens], reasons: list[str], problems: list[str]
) -> pa.Table:
    lengths = np.fromiter((len(row.input_ids) for row in tokens), np.int32, len(tokens))
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), pa.int64())
    ids = np.concatenate([row.input_ids for row in tokens]) if tokens else _NO_IDS
    masks = np.concatenate([row.loss_mask for row in tokens]) if tokens else _NO_MASK
    sums = np.concatenate([[0], np.cumsum(masks, dtype=np.int64)])
    bounds = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    head = rows.select(["file", "index", "line"]).take(pa.array(places, pa.int64())).combine_chunks()
    return pa.table(
        [
            *head.columns,
            pa.LargeListArray.from_arrays(offsets, pa.array(ids, pa.int32())),
            pa.LargeListArray.from_arrays(offsets, pa.array(masks, pa.bool_())),
            pa.array(lengths, pa.int32()),
            pa.array((sums[bounds[1:]] - sums[bounds[:-1]]).astype(np.int32), pa.int32()),
            pa.array([row.straddling for row in tokens], pa.int32()),
            pa.array(reasons, pa.string()),
            pa.array(problems, pa.string()),
        ],
        schema=TOKENS_SCHEMA,
    )
