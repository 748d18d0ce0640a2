import copy
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from raylm.data.schema import conversation_to_json
from raylm.data.templates import ChatTemplate, Segment
from raylm.data.tokenize import TOKENS_SCHEMA, tokenize_segments, tokenize_table

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=20)


def _chat(*contents: str) -> list[Any]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def _table(rows: list[list[Any] | None]) -> pa.Table:
    texts = [None if row is None else conversation_to_json({"messages": row}) for row in rows]
    return pa.table(
        {
            "file": pa.array([0] * len(rows), pa.int32()),
            "index": pa.array(range(len(rows)), pa.int64()),
            "conversation": pa.array(texts, pa.large_string()),
            "problem": pa.array(["" if text else "has no messages." for text in texts], pa.large_string()),
        }
    )


def test_ids_are_those_of_the_whole_rendering(tokenizer: Any) -> None:
    messages = _chat("hello world", "yes", "who are you?", "the answer")
    template = ChatTemplate(tokenizer, "m")
    (row,) = tokenize_segments(tokenizer, [template.render(messages)])
    assert row.input_ids.tolist() == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    marked = tokenizer.decode(row.input_ids[row.loss_mask])
    assert marked == "yes<|im_end|>the answer<|im_end|>"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
def test_marked_tokens_decode_to_what_the_assistant_says(tokenizer: Any, turns: list[tuple[str, str]]) -> None:
    """D01: found by construction, in any text."""
    messages = _chat(*[text for turn in turns for text in turn])
    (row,) = tokenize_segments(tokenizer, [ChatTemplate(tokenizer, "m").render(messages)])
    said = "".join(f"{answer}<|im_end|>" for _, answer in turns)
    assert tokenizer.decode(row.input_ids[row.loss_mask], clean_up_tokenization_spaces=False) == said


def test_pad_equal_to_eos_does_not_unlabel_the_end(tokenizer: Any) -> None:
    """D02."""
    other = copy.deepcopy(tokenizer)
    other.pad_token = other.eos_token
    (row,) = tokenize_segments(other, [ChatTemplate(other, "m").render(_chat("hi", "yes"))])
    ends = np.flatnonzero(row.input_ids == other.eos_token_id)
    assert row.loss_mask[ends].tolist() == [False, True]


def test_a_straddling_token_carries_no_loss(tokenizer: Any) -> None:
    """'he' belongs to the prompt and 'llo' to the answer; the token 'hello' holds both."""
    (row,) = tokenize_segments(tokenizer, [[Segment("world he", False), Segment("llo world", True)]])
    assert "llo" not in tokenizer.decode(row.input_ids[row.loss_mask])
    assert tokenizer.decode(row.input_ids[row.loss_mask]).endswith("world")


def test_every_row_is_accounted_for(tokenizer: Any) -> None:
    rows = [_chat("hi", "yes"), None, _chat("hi", "yes " * 60), _chat("a<|im_end|>", "b"), _chat("hi", "")]
    table = tokenize_table(_table(rows), ChatTemplate(tokenizer, "m"), tokenizer, max_seq_len=40)
    assert table.schema == TOKENS_SCHEMA
    assert table["reason"].to_pylist() == ["", "malformed", "too_long", "malformed", ""]
    assert [len(ids) for ids in table["input_ids"].to_pylist()] == table["length"].to_pylist()
    assert table["length"].to_pylist()[1:4] == [0, 0, 0]
    assert table["loss_tokens"].to_pylist()[4] == 1  # an empty answer trains its end token (D19)
    assert "more than data.max_seq_len=40" in table["problem"].to_pylist()[2]
