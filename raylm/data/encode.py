"""Rendered rows into token ids and loss masks, many rows in one call of the tokenizer.

Ids are those of the whole rendering, as a server would make them: pieces encoded one by one give other ids wherever a
token joins the end of one piece to the beginning of the next. Which tokens carry loss follows from where they lie in
the text. For byte-level tokenizers that is counted from the ids alone, for a whole batch at once; others are asked for
offsets, at half the speed.

A token carries loss when all of its text is written by the model in serving, and some of it is the answer or its end
token. A token that straddles the border of an answer otherwise carries none, and is counted.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np

from raylm.data.schema import RowProblem
from raylm.data.templates.literal import control_tokens
from raylm.data.templates.segments import Segment


@dataclass(frozen=True, slots=True)
class Tokens:
    """input_ids: (n,) int32; loss_mask: (n,) bool, True where the token is predicted and counts; straddling: tokens
    over the border of an answer, which carry no loss."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    straddling: int = 0


class Encoder:
    """A fast tokenizer, with what is known of its tokens."""

    def __init__(self, tokenizer: Any) -> None:
        """tokenizer: a transformers fast tokenizer. Its padding and truncation are not used."""
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_padding()
        self._backend.no_truncation()
        self._token_bytes = _byte_lengths(tokenizer)
        self._special_ids = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special} | set(
            tokenizer.all_special_ids
        )

    @property
    def counts_bytes(self) -> bool:
        """True when the place of a token follows from the ids before it."""
        return self._token_bytes is not None

    def encode(self, rows: Sequence[Sequence[Segment]]) -> list[Tokens | RowProblem]:
        """Ids and masks of rows, each the segments of one rendering; a problem where text cannot be kept as text.

        No special tokens are added: a rendering holds its own. The first token of a row never carries loss: nothing
        predicts it.
        """
        typed = {place for place, row in enumerate(rows) if any([segment.literal for segment in row])}
        plain = [place for place in range(len(rows)) if place not in typed]
        result: list[Tokens | RowProblem] = [Tokens(_EMPTY, _EMPTY.astype(bool))] * len(rows)
        chosen = [rows[place] for place in plain]
        encoded = self._by_bytes(chosen) if self.counts_bytes else self._by_offsets(chosen)
        for place, tokens in zip(plain, encoded, strict=True):
            result[place] = tokens
        for place in typed:
            result[place] = self._with_literals(rows[place])
        return result

    def _by_bytes(self, rows: Sequence[Sequence[Segment]]) -> list[Tokens]:
        assert self._token_bytes is not None
        texts = ["".join([segment.text for segment in row]) for row in rows]
        if not texts:
            return []
        id_lists = [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        counts = np.fromiter(map(len, id_lists), np.int64, len(id_lists))
        ids = np.fromiter(chain.from_iterable(id_lists), np.int32, int(counts.sum()))
        ends = np.cumsum(self._token_bytes[ids])
        starts = ends - self._token_bytes[ids]
        row_ends = np.cumsum(counts)
        row_starts = row_ends - counts
        text_bytes = np.fromiter((_num_bytes(text) for text in texts), np.int64, len(texts))
        first = np.where(counts > 0, starts[np.minimum(row_starts, max(len(starts) - 1, 0))] if len(starts) else 0, 0)
        token_bytes = np.where(counts > 0, ends[row_ends - 1] - first, 0) if len(ends) else np.zeros(len(texts))
        borders = _Borders()
        for row, base in zip(rows, first.tolist(), strict=True):
            borders.add(row, int(base), _num_bytes)
        mask, straddling = borders.mask(starts, ends, ids, self._specials)
        result: list[Tokens] = []
        for place, (begin, end) in enumerate(zip(row_starts.tolist(), row_ends.tolist(), strict=True)):
            if token_bytes[place] != text_bytes[place]:  # a control token that swallows spaces beside it
                result += self._by_offsets([rows[place]])
                continue
            own = mask[begin:end].copy()
            if len(own):
                own[0] = False
            result.append(Tokens(ids[begin:end], own, int(straddling[begin:end].sum())))
        return result

    def _by_offsets(self, rows: Sequence[Sequence[Segment]]) -> list[Tokens]:
        texts = ["".join([segment.text for segment in row]) for row in rows]
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        return [
            self._masked(np.asarray(encoding.ids, np.int32), np.asarray(encoding.offsets, np.int64), row)
            for encoding, row in zip(encodings, rows, strict=True)
        ]

    def _masked(self, ids: np.ndarray, offsets: np.ndarray, row: Sequence[Segment]) -> Tokens:
        if len(ids) == 0:
            return Tokens(ids, np.zeros(0, bool))
        borders = _Borders()
        borders.add(row, 0, len)
        mask, straddling = borders.mask(offsets[:, 0], offsets[:, 1], ids, self._specials)
        mask[0] = False
        return Tokens(ids, mask, int(straddling.sum()))

    @cached_property
    def _specials(self) -> np.ndarray:
        table = np.zeros(max(self._special_ids, default=0) + 1, bool)
        table[list(self._special_ids)] = True
        return table

    def _with_literals(self, row: Sequence[Segment]) -> Tokens | RowProblem:
        """A row in which somebody typed the name of a control token: pieces between the real control tokens are
        encoded on their own, without looking for control tokens in them.

        Whether the tokenizer makes the same of pieces as of the whole is tried on the same row with a harmless text
        in place of what was typed; where it does not, the row is refused.
        """
        harmless = [
            Segment("x" * len(segment.text), segment.loss, segment.generated) if segment.literal else segment
            for segment in row
        ]
        if not np.array_equal(self._in_pieces(harmless).input_ids, self._by_offsets([harmless])[0].input_ids):
            typed = next(segment.text for segment in row if segment.literal)
            return RowProblem(
                f"contains the control token {typed}, and this tokenizer cannot keep it as text.",
                "Remove it, or set data.allow_special_tokens=true.",
            )
        return self._in_pieces(row)

    def _in_pieces(self, row: Sequence[Segment]) -> Tokens:
        text = "".join(segment.text for segment in row)
        kept: list[tuple[int, int]] = []  # where control tokens are only text
        at = 0
        for segment in row:
            if segment.literal:
                kept.append((at, at + len(segment.text)))
            at += len(segment.text)
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []

        def add(start: int, end: int) -> None:
            if end > start:
                encoding = self._text_only.encode(text[start:end], add_special_tokens=False)
                ids.extend(encoding.ids)
                offsets.extend((first + start, last + start) for first, last in encoding.offsets)

        done = 0
        for match in self._special_pattern.finditer(text):
            token = next(group for group in match.groups() if group)
            if any(match.start() < end and match.end() > start for start, end in kept):
                continue
            add(done, match.start())
            ids.append(self._backend.token_to_id(token))
            offsets.append((match.start(), match.end()))
            done = match.end()
        add(done, len(text))
        return self._masked(np.asarray(ids, np.int32), np.asarray(offsets, np.int64).reshape(-1, 2), row)

    @cached_property
    def _text_only(self) -> Any:
        """The tokenizer without its control tokens."""
        from tokenizers import Tokenizer

        copy = Tokenizer.from_str(self._backend.to_str())
        copy.no_padding()
        copy.no_truncation()
        copy.encode_special_tokens = True
        return copy

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        options = {str(token): token for token in self._tokenizer.added_tokens_decoder.values()}
        parts = []
        for name in control_tokens(self._tokenizer):
            token = options.get(name)
            before = r"\s*" if token is not None and token.lstrip else ""
            after = r"\s*" if token is not None and token.rstrip else ""
            parts.append(f"{before}({re.escape(name)}){after}")
        return re.compile("|".join(parts) or r"(?!)")


_EMPTY = np.zeros(0, np.int32)


class _Borders:
    """Where answers lie: generated from, said from, said until, in the units of the offsets, rows one after another."""

    def __init__(self) -> None:
        self._generated: list[int] = []
        self._said: list[int] = []
        self._until: list[int] = []

    def add(self, row: Sequence[Segment], base: int, measure: Any) -> None:
        """The answers of a row that begins at `base`; measure: length of a text."""
        at = base
        generated: int | None = None
        said: int | None = None
        for segment in row:
            end = at + measure(segment.text)
            if segment.loss:
                if said is None:
                    said = at
                    generated = at if generated is None else generated
            else:
                if said is not None:
                    self._close(generated, said, at)
                    said = None
                generated = at if segment.generated else None
            at = end
        if said is not None:
            self._close(generated, said, at)

    def _close(self, generated: int | None, said: int, until: int) -> None:
        self._generated.append(said if generated is None else generated)
        self._said.append(said)
        self._until.append(until)

    def mask(
        self, starts: np.ndarray, ends: np.ndarray, ids: np.ndarray, specials: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Which tokens carry loss, and which straddle a border. specials: (m,) bool, by id."""
        if not self._said or len(ids) == 0:
            return np.zeros(len(ids), bool), np.zeros(len(ids), bool)
        generated, said, until = (np.asarray(x, np.int64) for x in (self._generated, self._said, self._until))
        # The last answer that begins before the token ends is the only one it can overlap.
        answer = np.searchsorted(said, ends, side="left") - 1
        known = np.maximum(answer, 0)
        overlaps = (answer >= 0) & (starts < until[known]) & (ends > starts)
        is_special = np.zeros(len(ids), bool)
        small = ids < len(specials)
        is_special[small] = specials[ids[small]]
        inside = (starts >= generated[known]) & ((ends <= until[known]) | is_special)
        return overlaps & inside, overlaps & ~inside


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8"))


def _byte_lengths(tokenizer: Any) -> np.ndarray | None:
    """Bytes of text that each id stands for, or None where that is not known from the id.

    Known for byte-level tokenizers without a normaliser: they write every byte of the text as one character.
    """
    import json

    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    if tree.get("normalizer") is not None or not _is_byte_level(tree.get("pre_tokenizer")):
        return None
    if (tree.get("decoder") or {}).get("type") != "ByteLevel":
        return None
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True)
    added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
    lengths = np.zeros(max(vocabulary.values()) + 1, np.int64)
    for token, number in vocabulary.items():
        lengths[number] = len(token)
    for number, token in added.items():
        lengths[number] = len(token.encode("utf-8"))
    return lengths


def _is_byte_level(step: Any) -> bool:
    """True for a ByteLevel step that adds no space, alone or in a sequence."""
    if not isinstance(step, dict):
        return False
    if step["type"] == "Sequence":
        inner = step["pretokenizers"]
        harmless = all(one["type"] in ("ByteLevel", "Split", "Digits") for one in inner)
        removes = any(one.get("behavior") == "Removed" for one in inner)
        return harmless and not removes and any(_is_byte_level(one) for one in inner)
    return step["type"] == "ByteLevel" and not step.get("add_prefix_space")
