"""A tokenizer with more tokens: pieces learnt from a corpus (data/pieces.py), and texts that become one token each.

Learnt pieces go into the tokenizer's own BPE model, as vocabulary entries and as merges behind all others, so they are
found inside words as its other pieces are. A piece never reaches over the border of a unit: a unit is what the
tokenizer's own pre-tokenizer leaves in one part and, where it works on whole sentences (SentencePiece), one word, one
run of punctuation or, if the vocabulary has no numbers, one digit. Control tokens are borders too.

Ids: a fast tokenizer numbers the added tokens that its model does not know anew whenever it is loaded, counting from
the size of the model's vocabulary. Every added token is therefore written into that vocabulary under the id it has, and
new ids start behind the highest.
"""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from raylm.data.pieces import Learnt, learn_pieces
from raylm.data.tokenizer import load_tokenizer
from raylm.errors import DataError, ModelError

_BATCH_TEXTS = 512
_SAMPLE_TEXTS = 200


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token that was added. parts: the ids of the old tokens that its text was made of."""

    id: int
    text: str
    parts: tuple[int, ...]


class VocabularyExtension:
    """A tokenizer and the tokens that are added to it."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        """tokenizer: a transformers fast tokenizer, which is changed; name: of the model, for messages."""
        self.tokenizer, self._name = tokenizer, name
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_padding()
        self.backend.no_truncation()
        self._old = _copy(self.backend)
        self.first_id = max(self.backend.get_vocab(with_added_tokens=True).values()) + 1
        self.added: list[NewToken] = []
        self._learnt: list[Learnt] = []
        self._sample: list[str] = []

    @property
    def num_tokens(self) -> int:
        """Ids from 0 to the highest, with what is added so far."""
        return self.first_id + len(self.added)

    def add_tokens(self, tokens: Sequence[str], *, special: bool) -> None:
        """Makes each text one token wherever it occurs. special: a control token.

        Raises DataError for a text that is a token already.
        """
        from tokenizers import AddedToken

        for token in tokens:
            if self.backend.token_to_id(token) is not None:
                raise DataError(f"token {token!r}", f"is in the vocabulary of {self._name} already.", "Leave it out.")
            parts = tuple(self._old.encode(token, add_special_tokens=False).ids)
            new = AddedToken(token, special=special, normalized=False)
            self.tokenizer.add_tokens([new], special_tokens=special)
            number = self.backend.token_to_id(token)
            if number != self.num_tokens:
                raise ModelError(self._name, f"its tokenizer gives {token!r} the id {number}, not {self.num_tokens}.")
            self.added.append(NewToken(number, token, parts))

    def learn(self, texts: Iterable[str], *, min_frequency: int, limit: int) -> None:
        """Adds at most `limit` pieces, those that save most tokens first; fewer when no more save min_frequency.

        Tokens must have been added before. Raises ModelError for a tokenizer whose model takes no merges.
        """
        check_takes_pieces(self.backend, self._name)
        model = _BpeModel(self.backend)
        units = _units(self.backend, model, self._kept(texts))
        parts: dict[int, tuple[int, ...]] = {}
        found = learn_pieces(
            units,
            {symbol: model.num_bytes(symbol) for unit in units for symbol in unit if symbol < 0},
            first_symbol=self.num_tokens + limit,  # provisional, above every id
            accepts=model.accepts,
            min_frequency=min_frequency,
        )
        for learnt in islice(found, limit):
            model.add(learnt)
            if learnt.pair is None:
                parts[learnt.symbol] = model.byte_ids(learnt.symbol)
            else:
                left, right = learnt.pair
                parts[learnt.symbol] = (*parts.get(left, (left,)), *parts.get(right, (right,)))
            self.added.append(NewToken(self.num_tokens, model.text(learnt.symbol), parts[learnt.symbol]))
            self._learnt.append(learnt)

    @property
    def num_learnt(self) -> int:
        """Pieces learnt and kept."""
        return len(self._learnt)

    def save(self, folder: Path) -> None:
        """Writes the tokenizer with all its files and loads it again.

        Raises ModelError when the loaded one has other ids, or reads the corpus in another way.
        """
        self.tokenizer.save_pretrained(folder)
        if self._learnt:
            self._with_pieces().save(str(folder / "tokenizer.json"))
        self._check_saved(folder)

    def _with_pieces(self) -> Any:
        from tokenizers import Tokenizer

        tree = json.loads(self.backend.to_str())
        vocabulary, merges = tree["model"]["vocab"], tree["model"]["merges"]
        for entry in tree["added_tokens"]:
            vocabulary.setdefault(entry["content"], entry["id"])
        texts = {number: token for token, number in vocabulary.items()}
        for learnt, token in zip(self._learnt, self._pieces(), strict=True):
            vocabulary[token.text] = token.id
            texts[learnt.symbol] = token.text
            if learnt.pair is not None:
                merges.append([texts[part] for part in learnt.pair])
        return Tokenizer.from_str(json.dumps(tree))

    def _pieces(self) -> list[NewToken]:
        return self.added[len(self.added) - len(self._learnt) :]

    def _kept(self, texts: Iterable[str]) -> Iterator[str]:
        for text in texts:
            if len(self._sample) < _SAMPLE_TEXTS:
                self._sample.append(text)
            yield text

    def _check_saved(self, folder: Path) -> None:
        """Some tokenizer classes build themselves anew from parts of the files, so nothing is believed."""
        again = load_tokenizer(str(folder))
        backend = again.backend_tokenizer
        before = self._old.get_vocab(with_added_tokens=True)
        if again.get_vocab() != {**before, **{token.text: token.id for token in self.added}}:
            raise ModelError(self._name, f"its tokenizer class {type(again).__name__} does not keep the new ids.")
        parts = {token.id: token.parts for token in self._pieces()}
        for text in self._sample:
            old, new = (t.encode(text, add_special_tokens=False).ids for t in (self._old, backend))
            if any(number >= self.first_id and number not in parts for number in new):
                continue  # spaces beside added tokens are the tokenizer's affair
            if [part for number in new for part in parts.get(number, (number,))] != old:
                raise ModelError(self._name, f"its tokenizer would read {text[:60]!r} in another way than before.")
            if self._old.decode(old) != backend.decode(new):
                raise ModelError(self._name, f"its tokenizer would not give {text[:60]!r} back.")


def check_takes_pieces(backend: Any, name: str) -> None:
    """Raises ModelError unless pieces can be learnt for the tokenizer: BPE, without marks for the ends of words."""
    model = json.loads(backend.to_str())["model"]
    advice = "Add whole words as tokens instead (--tokens)."
    if model["type"] == "Unigram":
        raise ModelError(
            name, "its tokenizer is of kind Unigram: every piece has a probability, and adding some moves all.", advice
        )
    if model["type"] != "BPE":
        raise ModelError(name, f"its tokenizer is of kind {model['type']}, which has no merges to carry on.", advice)
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ModelError(name, "its tokenizer marks the insides or ends of words, which is not supported.", advice)


class _BpeModel:
    """What is known of a BPE tokenizer's symbols: its ids, and characters spelt in bytes (-1 - code point)."""

    def __init__(self, backend: Any) -> None:
        tree = json.loads(backend.to_str())
        self.is_byte_level = _uses_byte_level(tree["pre_tokenizer"])
        self.barriers = {entry["id"] for entry in tree["added_tokens"]}
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self._text = {number: token for token, number in vocabulary.items()}
        self._taken = set(vocabulary)
        self._controls = [self._spelt(entry["content"]) for entry in tree["added_tokens"]]
        self._bytes = _byte_tokens(vocabulary) if tree["model"].get("byte_fallback") else {}
        self._byte_of = {number: byte for byte, number in self._bytes.items()}
        self.byte_numbers = set(self._byte_of)
        digits = {"".join(c for c in token if c != "▁") for token in vocabulary if not self.is_byte_level}
        self.single_digits = not any(len(run) > 1 and run.isdigit() for run in digits)

    def text(self, symbol: int) -> str:
        """A symbol as the vocabulary spells it."""
        return self._text[symbol] if symbol >= 0 else chr(-1 - symbol)

    def num_bytes(self, symbol: int) -> int:
        """Bytes of a character symbol."""
        return len(self.text(symbol).encode())

    def byte_ids(self, symbol: int) -> tuple[int, ...]:
        """The byte tokens of a character symbol."""
        return tuple(self._bytes[byte] for byte in self.text(symbol).encode())

    def character(self, numbers: Sequence[int]) -> str | None:
        """The character that byte tokens spell, None while it is not whole."""
        try:
            return bytes(self._byte_of[number] for number in numbers).decode()
        except UnicodeDecodeError:
            return None

    def accepts(self, left: int, right: int) -> bool:
        """False when the joined text is a token already, or holds a control token."""
        joined = self.text(left) + self.text(right)
        return joined not in self._taken and not any(control in joined for control in self._controls)

    def add(self, learnt: Learnt) -> None:
        """Takes a learnt symbol in."""
        if learnt.pair is not None:
            self._text[learnt.symbol] = self.text(learnt.pair[0]) + self.text(learnt.pair[1])
        self._taken.add(self.text(learnt.symbol))

    def _spelt(self, content: str) -> str:
        """A text as the vocabulary spells it: byte-level tokenizers write every byte as a character."""
        if not self.is_byte_level:
            return content
        from tokenizers.pre_tokenizers import ByteLevel

        spelt = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(content)
        return "".join(part for part, _ in spelt)


def _units(backend: Any, model: _BpeModel, texts: Iterable[str]) -> Counter[tuple[int, ...]]:
    """How often the corpus has each unit of two symbols and more (or of one character spelt in bytes)."""
    cut = _cut_at_words if model.is_byte_level else _WordCutter(model).cut
    counts: Counter[tuple[int, ...]] = Counter()
    iterator = iter(texts)
    while batch := list(islice(iterator, _BATCH_TEXTS)):
        for text, encoding in zip(batch, backend.encode_batch(batch, add_special_tokens=False), strict=True):
            counts.update(cut(text, encoding))
    if model.is_byte_level:
        return Counter({unit: n for unit, n in counts.items() if not model.barriers.intersection(unit)})
    return counts


def _cut_at_words(text: str, encoding: Any) -> Iterator[tuple[int, ...]]:
    """The parts that the pre-tokenizer made; those of one token have nothing to join."""
    ids = encoding.ids
    words = np.asarray([-1 if word is None else word for word in encoding.word_ids], np.int64)
    borders = [0, *(np.flatnonzero(np.diff(words)) + 1).tolist(), len(ids)]
    for start, end in pairwise(borders):
        if end - start > 1:
            yield tuple(ids[start:end])


class _WordCutter:
    """Cuts the tokens of a sentence into words, runs of punctuation, and numbers."""

    def __init__(self, model: _BpeModel) -> None:
        self._model = model
        self._edges: dict[int, tuple[str, str, bool]] = {}

    def cut(self, text: str, encoding: Any) -> Iterator[tuple[int, ...]]:
        """The units of one text."""
        unit: list[int] = []
        last = ""
        last_word: int | None = None
        for symbol, word in self._symbols(encoding):
            first, end, begins_word = self._edges_of(symbol)
            apart = begins_word or word != last_word or (last not in ("", first))
            if unit and (apart or (first == "number" and self._model.single_digits)):
                yield tuple(unit)
                unit = []
            if first == "border":
                continue
            unit.append(symbol)
            last, last_word = end, word
        if unit:
            yield tuple(unit)

    def _symbols(self, encoding: Any) -> Iterator[tuple[int, int | None]]:
        """Tokens and their words; the bytes of a character are one symbol."""
        pending: list[int] = []
        for number, word in zip(encoding.ids, encoding.word_ids, strict=True):
            if number not in self._model.byte_numbers:
                yield number, word
                continue
            pending.append(number)
            character = self._model.character(pending)
            if character is not None:
                yield (-1 - ord(character) if len(pending) > 1 else number), word
                pending = []

    def _edges_of(self, symbol: int) -> tuple[str, str, bool]:
        """What a symbol begins and ends with, and whether it begins a word; spaces alone go with any."""
        if symbol not in self._edges:
            text = self._model.text(symbol)
            bare = text.replace("▁", " ").strip()
            if symbol in self._model.barriers or symbol in self._model.byte_numbers:
                self._edges[symbol] = ("border", "border", True)
            elif not bare:
                self._edges[symbol] = ("", "", True)
            else:
                self._edges[symbol] = (_kind(bare[0]), _kind(bare[-1]), text[0] in "▁ ")
        return self._edges[symbol]


def _kind(character: str) -> str:
    return {"L": "letter", "M": "letter", "N": "number"}.get(unicodedata.category(character)[0], "sign")


def _uses_byte_level(step: Any) -> bool:
    if not isinstance(step, dict):
        return False
    return step["type"] == "ByteLevel" or any(_uses_byte_level(inner) for inner in step.get("pretokenizers", ()))


def _byte_tokens(vocabulary: dict[str, int]) -> dict[int, int]:
    """Byte -> the id of its token, `<0x41>`."""
    return {byte: vocabulary[f"<0x{byte:02X}>"] for byte in range(256) if f"<0x{byte:02X}>" in vocabulary}


def _copy(backend: Any) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(backend.to_str())
