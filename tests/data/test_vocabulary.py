"""Tokenizers with more tokens: ids of old texts, round trips, and the traps of each kind of tokenizer."""

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raylm.data.encode import Encoder, Tokens
from raylm.data.templates import Segment
from raylm.data.tokenizer import load_tokenizer
from raylm.data.vocabulary import VocabularyExtension
from raylm.errors import DataError, ModelError
from tests.tiny import build_tokenizer

SHARED = Path(os.environ.get("RAYLM_SHARED", "/nonexistent"))
CORPUS = ["the whales sing to other whales, the smaller whales listen.", "猫と猫が猫を見る。", "42 whales, 4242 猫"] * 5
OTHER = [
    "hello world, who are you?",
    "a\tb  c\n\nd",
    "é ☃ 🙂 ﷺ",
    "",
    " ",
    "2024-01-01",
    "<|im_start|>user\nhi<|im_end|>",
]


def sentence_tokenizer(*, metaspace: bool = True, ignore_merges: bool = False) -> Any:
    """What SentencePiece's BPE becomes: no words, ▁ for spaces, bytes for unknown characters, single digits."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    pieces += [*".,?!<|>-_0123456789", "▁t", "he", "▁the", "wh", "le"]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: number for number, piece in enumerate(pieces)},
            [("▁", "t"), ("h", "e"), ("▁t", "he"), ("w", "h"), ("l", "e")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
            ignore_merges=ignore_merges,
        )
    )
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<e>"],
    )


def byte_level_tokenizer(*, ignore_merges: bool) -> Any:
    """As Llama 3 and Qwen have it: words split by a pattern, control tokens outside the model's vocabulary."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate([*alphabet, "th", "the", "Ġw"])}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "w")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[^\s\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|spare|>"],
    )


TOKENIZERS = {
    "chatml": build_tokenizer,
    "llama3": lambda: byte_level_tokenizer(ignore_merges=True),
    "qwen": lambda: byte_level_tokenizer(ignore_merges=False),
    "llama2": sentence_tokenizer,
    "phi3": lambda: sentence_tokenizer(metaspace=False),
}


def _spelt(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class Extended:
    """A tokenizer before and after, and what each new id is made of."""

    def __init__(self, tokenizer: Any, folder: Path, corpus: list[str], **options: Any) -> None:
        self.old = copy.deepcopy(tokenizer)
        extension = VocabularyExtension(tokenizer, "m")
        extension.add_tokens(options.get("special", ()), special=True)
        extension.add_tokens(options.get("tokens", ()), special=False)
        extension.learn(corpus, min_frequency=2, limit=options.get("limit", 60))
        extension.save(folder)
        self.added, self.num_learnt = extension.added, extension.num_learnt
        self.new = load_tokenizer(str(folder))
        self.parts = {token.id: token.parts for token in extension.added}

    def check(self, text: str) -> None:
        """The rule: the old ids, with some runs of them put together, and the same text back."""
        ids = _spelt(self.new, text)
        apart = [part for number in ids for part in self.parts.get(number, (number,))]
        assert apart == _spelt(self.old, text)
        assert _decoded(self.new, ids) == _decoded(self.old, apart)


@pytest.fixture(scope="module", params=TOKENIZERS)
def extended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Extended:
    folder = tmp_path_factory.mktemp("tokenizer") / "t"
    return Extended(TOKENIZERS[request.param](), folder, CORPUS, limit=60)


def test_the_corpus_takes_fewer_tokens_and_comes_back(extended: Extended) -> None:
    assert extended.num_learnt >= 15
    for text in set(CORPUS):
        assert len(_spelt(extended.new, text)) < 0.7 * len(_spelt(extended.old, text))
        extended.check(text)
        assert _decoded(extended.new, _spelt(extended.new, text)) == text


@pytest.mark.parametrize("text", OTHER)
def test_texts_without_a_new_piece_keep_their_ids(extended: Extended, text: str) -> None:
    extended.check(text)
    if not any(_decoded(extended.new, [token.id]).strip() in text for token in extended.added):
        assert _spelt(extended.new, text) == _spelt(extended.old, text)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from([*"whales 猫と4,. \n", "the", " whales", "<|im_end|>", "</s>", "é", "🙂"])).map("".join)
)
def test_ids_are_the_old_ones_put_together_in_any_text(extended: Extended, text: str) -> None:
    extended.check(text)


def test_ids_are_new_and_without_a_gap(extended: Extended) -> None:
    first = max(extended.old.get_vocab().values()) + 1
    assert [token.id for token in extended.added] == list(range(first, first + len(extended.added)))
    assert {**extended.new.get_vocab(), **extended.old.get_vocab()} == extended.new.get_vocab()
    assert len(extended.new) == first + len(extended.added)
    assert extended.new.all_special_ids == extended.old.all_special_ids


def test_pieces_stay_within_words_and_numbers(extended: Extended) -> None:
    for token in extended.added:
        text = _decoded(extended.new, [token.id])
        assert " " not in text.lstrip(" ")
        assert not ("," in text and any(c.isalnum() for c in text))
    sentences = extended.old.backend_tokenizer.model.byte_fallback
    assert sentences == (not any(token.text == "42" for token in extended.added))


def test_pieces_of_control_tokens_are_never_learnt(tmp_path: Path) -> None:
    typed = ["<|im_start|> and <|act|> here", "an <|act|>"] * 9
    extended = Extended(build_tokenizer(), tmp_path / "t", typed, special=["<|act|>"], limit=50)
    act = extended.added[0]
    assert _spelt(extended.new, "x<|act|>y")[1] == act.id
    assert act.parts == tuple(_spelt(extended.old, "<|act|>"))
    assert not any(set("<|>") & set(token.text) for token in extended.added[1:])
    assert extended.new.decode([act.id], skip_special_tokens=True) == ""
    text_only = copy.deepcopy(extended.new.backend_tokenizer)
    text_only.encode_special_tokens = True
    assert act.id not in text_only.encode("<|act|>").ids  # what somebody typed stays text


def test_a_corpus_that_spells_a_control_token_as_text_teaches_none_of_it(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    extension = VocabularyExtension(tokenizer, "m")
    extension.backend.encode_special_tokens = True
    extension.learn(["<|im_end|>"] * 9, min_frequency=2, limit=50)
    assert not any("<|im_end|>" in token.text for token in extension.added)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_given_tokens_are_one_id_wherever_they_stand(name: str, tmp_path: Path) -> None:
    extended = Extended(
        TOKENIZERS[name](), tmp_path / "t", CORPUS, tokens=["blowhole", "deep sea"], special=["<|act|>"]
    )
    texts = [token.text for token in extended.added]
    assert texts[:3] == ["<|act|>", "blowhole", "deep sea"]
    for token in extended.added[:3]:
        assert token.id in _spelt(extended.new, f"the {token.text}s")
        assert token.parts == tuple(_spelt(extended.old, token.text))
    extended.check("the whales sing")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([*"whales 猫と4,. ", "the", " whales", "🙂"]), min_size=1).map("".join))
def test_loss_masks_find_the_answer_among_new_pieces(extended: Extended, answer: str) -> None:
    """D01."""
    end = str(extended.new.eos_token)
    encoder = Encoder(extended.new)
    assert encoder.counts_bytes is not bool(extended.old.backend_tokenizer.model.byte_fallback)
    (row,) = encoder.encode([[Segment("the whales:\n", False), Segment(f"{answer}{end}", True)]])
    assert isinstance(row, Tokens)
    said = extended.new.decode(row.input_ids[row.loss_mask], clean_up_tokenization_spaces=False)
    assert said.strip() == f"{answer}{end}".strip()
    assert row.straddling == 0


def test_given_tokens_go_into_a_unigram_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz")]
    backend = Tokenizer(models.Unigram(pieces, 0, False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    extension = VocabularyExtension(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"), "m")
    before = extension.backend.encode("a whale").ids
    extension.add_tokens(["blowhole"], special=False)
    extension.save(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert _spelt(again, "a whale") == before
    assert again.convert_ids_to_tokens(_spelt(again, "ablowhole"))[-1] == "blowhole"
    assert [again.convert_ids_to_tokens(part) for part in extension.added[0].parts] == ["▁", *"blowhole"]


def test_extending_twice(tmp_path: Path) -> None:
    first = Extended(build_tokenizer(), tmp_path / "one", CORPUS, limit=10, special=["<|act|>"])
    second = Extended(first.new, tmp_path / "two", ["penguins waddle to other penguins"] * 9, limit=10)
    assert second.added[0].id == first.added[-1].id + 1
    second.check("the whales and penguins <|act|>")


def test_what_cannot_be_extended_says_so() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    for model, message in (
        (models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, False), "is of kind Unigram"),
        (models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), "is of kind WordPiece"),
        (models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>"), "marks the insides or ends of words"),
    ):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
        with pytest.raises(ModelError, match=message):
            VocabularyExtension(tokenizer, "m").learn(["a"], min_frequency=1, limit=1)
    with pytest.raises(DataError, match=r"token 'hello': is in the vocabulary of m already"):
        VocabularyExtension(build_tokenizer(), "m").add_tokens(["hello"], special=False)


def _demo() -> Iterator[str]:
    for row in json.loads((SHARED / "llamafactory-demo" / "alpaca_zh_demo.json").read_text()):
        yield from (row[key] for key in ("instruction", "input", "output") if row.get(key))


@pytest.mark.skipif(not SHARED.is_dir(), reason="RAYLM_SHARED names no folder of real data")
@pytest.mark.parametrize("name", ["gpt2", "llama2", "phi3"])
def test_real_tokenizers(name: str, tmp_path: Path) -> None:
    texts = list(_demo())
    tokenizer = load_tokenizer(str(SHARED / "tokenizers" / name))
    extended = Extended(tokenizer, tmp_path / "t", texts[::4], limit=300)
    assert extended.num_learnt == 300
    english = json.loads((SHARED / "llamafactory-demo" / "alpaca_en_demo.json").read_text())
    for text in [*texts[:300], *OTHER, *(row["output"] for row in english[:200])]:
        extended.check(text)
    for text in texts[:300]:
        assert _decoded(extended.new, _spelt(extended.new, text)) == text
    assert sum(len(_spelt(extended.new, t)) for t in texts[:300]) < 0.85 * sum(
        len(_spelt(extended.old, t)) for t in texts[:300]
    )
