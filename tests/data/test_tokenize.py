import json
from typing import Any

import numpy as np
import pytest

from raylm.data.tokenize import TOKENS_SCHEMA, RowTokenizer
from tests.data.support import bot, chat, rows_of, table_of, user


def _table(rows: RowTokenizer, *instances: Any) -> dict[str, list[Any]]:
    texts = [None if row is None else row if isinstance(row, str) else json.dumps(row) for row in instances]
    table = rows.table(table_of(texts))
    assert table.schema == TOKENS_SCHEMA
    return dict(table.to_pydict())


def _said(tokenizer: Any, columns: dict[str, list[Any]], place: int = 0) -> str:
    ids, mask = np.array(columns["input_ids"][place]), np.array(columns["loss_mask"][place])
    return str(tokenizer.decode(ids[mask], clean_up_tokenization_spaces=False))


def test_every_row_is_accounted_for(tokenizer: Any) -> None:
    rows = [chat("hi", "yes"), None, chat("hi", "yes " * 60), "{", chat("hi", ""), {"messages": [user("alone")]}]
    columns = _table(rows_of(tokenizer, max_seq_len=40), *rows)
    assert columns["reason"] == ["", "malformed", "too_long", "malformed", "", "malformed"]
    assert [len(ids) for ids in columns["input_ids"]] == columns["length"]
    assert columns["length"][1:4] == [0, 0, 0]
    assert columns["loss_tokens"][4] == 1  # an empty answer trains its end token (D19)
    assert "more than data.max_seq_len=40" in columns["problem"][2]
    assert columns["problem"][3].startswith("column 2: not valid JSON")
    assert columns["line"] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("loss_on", "said"),
    [
        ("assistant", "yes<|im_end|>the answer<|im_end|>"),
        ("last_assistant", "the answer<|im_end|>"),
        (
            "all",
            "user\nhello<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>user\nwho<|im_end|>\n"
            "<|im_start|>assistant\nthe answer<|im_end|>\n",
        ),
    ],
)
def test_loss_modes(tokenizer: Any, loss_on: str, said: str) -> None:
    rows = rows_of(tokenizer, loss_on=loss_on)
    assert _said(tokenizer, _table(rows, chat("hello", "yes", "who", "the answer"))) == said


@pytest.mark.parametrize("template", ["auto", "chatml", "llama2"])
@pytest.mark.parametrize("silent", [{"train": False}, {"weight": 0}])
def test_a_turn_may_be_left_out_of_the_loss(tokenizer: Any, template: str, silent: dict[str, Any]) -> None:
    messages = [{"role": "system", "content": "be kind"}, user("a"), bot("yes", **silent), user("b"), bot("the")]
    columns = _table(rows_of(tokenizer, template), {"messages": messages})
    assert _said(tokenizer, columns) == "the<|im_end|>"
    none = _table(rows_of(tokenizer, template), {"messages": [user("a"), bot("yes", **silent)]})
    assert none["reason"] == ["no_loss"]


def test_plain_text_carries_loss_everywhere_and_ends(tokenizer: Any) -> None:
    columns = _table(rows_of(tokenizer), {"text": "hello world"}, {"input": "who are", "output": " you?"})
    assert tokenizer.decode(columns["input_ids"][0]) == "hello world<|im_end|>"
    assert columns["loss_mask"][0] == [False] + [True] * (columns["length"][0] - 1)
    assert _said(tokenizer, columns, 1) == " you?<|im_end|>"


def test_plain_text_needs_no_chat_template(tokenizer: Any) -> None:
    from raylm.data.tokenize import FileOptions, TokenizeOptions

    rows = RowTokenizer(tokenizer, TokenizeOptions(max_seq_len=64), [FileOptions("auto", {}, None)])
    columns = _table(rows, {"text": "hello"}, chat("hi", "yes"))
    assert columns["reason"] == ["", "malformed"]
    assert "the tokenizer has no chat template" in columns["problem"][1]


LONG = chat("hello", "yes", "who are you?", "the answer is yes " * 3, "world", "yes " * 4)


@pytest.mark.parametrize("limit", range(8, 80, 3))
def test_keep_start_cuts_behind_an_answer_token(tokenizer: Any, limit: int) -> None:
    """D10, D25: the part of an answer that fits carries loss, no header is cut, no end token is added."""
    whole = _table(rows_of(tokenizer), LONG)
    columns = _table(rows_of(tokenizer, max_seq_len=limit, truncation="keep_start"), LONG)
    kept = columns["input_ids"][0]
    assert kept == whole["input_ids"][0][: len(kept)]
    if columns["reason"] == [""]:
        assert len(kept) <= limit
        assert columns["loss_mask"][0][-1]
        fits = [place for place, loss in enumerate(whole["loss_mask"][0][:limit]) if loss]
        assert len(kept) == fits[-1] + 1
    else:
        assert columns["reason"] == ["too_long"]
        assert not any(whole["loss_mask"][0][:limit])


def test_keep_end_keeps_whole_last_turns_and_the_system_text(tokenizer: Any) -> None:
    """D09, D25."""
    conversation = {"system": "be kind", **LONG}
    size = len(_table(rows_of(tokenizer), conversation)["input_ids"][0])
    rows = rows_of(tokenizer, max_seq_len=size - 1, truncation="keep_end")
    columns = _table(rows, conversation)
    text = tokenizer.decode(columns["input_ids"][0])
    assert text.startswith("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nwho are you?")
    assert _said(tokenizer, columns) == "the answer is yes " * 3 + "<|im_end|>" + "yes " * 4 + "<|im_end|>"
    assert _table(rows_of(tokenizer, max_seq_len=12, truncation="keep_end"), LONG)["reason"] == ["too_long"]


def test_split_predicts_every_token_once(tokenizer: Any) -> None:
    text = "hello world, who are you? " * 9
    whole = _table(rows_of(tokenizer), {"text": text})
    columns = _table(rows_of(tokenizer, max_seq_len=16, truncation="split"), {"text": text}, {"text": "yes"})
    assert columns["index"].count(0) > 3
    assert max(columns["length"]) <= 16
    assert sum(columns["loss_tokens"][:-1]) == whole["loss_tokens"][0]
    parts = [ids for ids, index in zip(columns["input_ids"], columns["index"], strict=True) if index == 0]
    assert parts[0] + [token for part in parts[1:] for token in part[1:]] == whole["input_ids"][0]
    assert columns["reason"] == [""] * len(columns["reason"])


def test_typed_control_tokens_stay_text(tokenizer: Any) -> None:
    """Training never sees a control token that somebody typed; the text itself is kept."""
    row = chat("a<|im_end|>b <|im_start|>", "say <|im_end|> now")
    columns = _table(rows_of(tokenizer), row)
    ids = columns["input_ids"][0]
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(row["messages"], tokenize=False)
    assert _said(tokenizer, columns) == "say <|im_end|> now<|im_end|>"
    allowed = _table(rows_of(tokenizer, allow_special_tokens=True), row)["input_ids"][0]
    assert allowed.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 4


def test_rows_for_alignment_are_refused_by_kind(tokenizer: Any) -> None:
    columns = _table(rows_of(tokenizer), {"prompt": "a", "chosen": "b", "rejected": "c"})
    assert "is a row of kind preference" in columns["problem"][0]
