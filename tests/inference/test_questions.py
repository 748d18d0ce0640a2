"""What rows of each format ask."""

import errno
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raylm.cli.generation import _is_setting
from raylm.config import GenerateConfig
from raylm.config.data import SourceSection
from raylm.data import readers
from raylm.data.prompt import PromptEncoder
from raylm.data.readers import RawRow
from raylm.data.schema import RowProblem
from raylm.data.sources import list_files
from raylm.data.templates import chat_template
from raylm.data.tokenizer import load_tokenizer
from raylm.errors import ConfigError
from raylm.inference.engine import row_seed, sampling_params
from raylm.inference.generate import has_gpus
from raylm.inference.progress import Progress
from raylm.inference.questions import Question, QuestionReader
from raylm.inference.reading import batches_of, read_files


def asked(row: dict[str, Any], form: str = "", **options: Any) -> Question:
    settings = {"format": "auto", "columns": {}, "template": "auto", "role_map": {}, "system": None, "turns": "last"}
    reader = QuestionReader(**{**settings, **options})
    return reader.question(reader.load(json.dumps(row)), form)


def says(question: Question) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in question.messages]


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CHAT = [turn("user", "a"), turn("assistant", "b", train=False), turn("user", "c"), turn("assistant", "d")]


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"text": "c"}, {}),
        ({"input": "c", "output": "d"}, {}),
        ({"input": "c"}, {}),
        ({"prompt": "c"}, {}),
        ({"prompt": [turn("user", "c")]}, {}),
        ({"prompt": "c", "completion": "d"}, {}),
        ({"prompt": [turn("user", "c")], "completion": [turn("assistant", "d")]}, {}),
        ({"prompt": "c", "response": None}, {}),
        ({"question": "c"}, {}),
        ({"problem": "c", "solution": "d"}, {"columns": {"question": "problem", "answer": "solution"}}),
        ({"problem": "c"}, {"columns": {"question": "problem"}}),
        ({"problem": "c"}, {"columns": {"instruction": "problem"}, "format": "alpaca"}),
        ({"instruction": "c", "output": "d"}, {}),
        ({"instruction": "c"}, {}),
        ({"conversations": [{"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}]}, {}),
        ({"messages": [turn("user", "c")]}, {}),
        ({"messages": [turn("user", "c"), turn("assistant", "d")]}, {}),
        ({"messages": [turn("customer", "c")]}, {"role_map": {"customer": "user"}}),
        ({"prompt": "c", "chosen": "d", "rejected": "e"}, {}),
        ({"prompt": "c", "completion": "d", "label": True}, {}),
        ({"input": "c", "output": ["d", "e"]}, {"format": "text_to_textlist"}),
    ],
)
def test_each_format_asks_the_same_with_and_without_an_answer(row: dict[str, Any], options: dict[str, Any]) -> None:
    question = asked(row, **options)
    assert says(question) == [("user", "c")]
    assert question.answers == (1,)


def test_the_last_turn_or_each_turn_is_answered() -> None:
    last = asked({"messages": CHAT})
    assert (says(last), last.answers) == ([("user", "a"), ("assistant", "b"), ("user", "c")], (3,))
    assert "train" not in last.messages[1]
    every = asked({"messages": CHAT}, turns="all", system="s")
    assert (every.answers, every.messages[0]) == ((2, 4), {"role": "system", "content": "s"})
    opens = asked({"messages": [turn("assistant", "hello"), *CHAT]}, turns="all")
    assert opens.answers == (2, 4), "what the assistant opens with answers nothing"
    own = asked({"messages": CHAT, "system": "own"}, system="s")
    assert own.messages[0]["content"] == "own"


def test_tools_and_ids_travel() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    call = {"function": {"name": "f", "arguments": '{"a": "é"}'}}
    messages = [turn("user", "a"), turn("assistant", "", tool_calls=[call]), turn("tool", "3")]
    question = asked({"id": 5, "messages": messages, "tools": tools})
    assert (question.id, list(question.tools), question.answers) == (5, tools, (3,))
    assert question.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": "é"}
    assert asked({"uid": "u", "text": "a"}, columns={"id": "uid"}).id == "u"
    assert asked({"id": True, "text": "a"}).id is None


@pytest.mark.parametrize(
    ("row", "options", "reason"),
    [
        ({"messages": []}, {}, "has no messages"),
        ({"messages": [turn("assistant", "d")]}, {}, "nothing to answer"),
        ({"messages": [turn("system", "d")]}, {}, "nothing to answer"),
        ({"other": "c"}, {}, "of no known format"),
        ({"text": "c"}, {"columns": {"text": "body"}}, "has no column 'body'"),
        ({"images": ["a.png"], "text": "c"}, {}, "kind image_text"),
        ({"messages": CHAT}, {"template": "none"}, "template=none takes plain text"),
    ],
)
def test_what_asks_nothing_has_a_reason(row: dict[str, Any], options: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowProblem, match=reason):
        asked(row, **options)


def test_plain_text_is_gone_on_with_as_it_stands(tokenizer: Any, tiny_model_dir: Any) -> None:
    assert asked({"text": " c\n"}, template="none").text == " c\n"
    assert asked({"question": "c", "answer": "d"}, template="none").text == "c"
    loaded = load_tokenizer(str(tiny_model_dir))
    plain = PromptEncoder(loaded, "tiny", "none")
    assert plain.text_ids("hello <|im_end|>") == loaded("hello ")["input_ids"] + plain.text_ids("<|im_end|>")
    assert loaded.convert_tokens_to_ids("<|im_end|>") not in plain.text_ids("hello <|im_end|>")
    assert plain.stop_token_ids == []
    assert PromptEncoder(loaded, "tiny", "chatml").stop_token_ids == [loaded.convert_tokens_to_ids("<|im_end|>")]
    messages = [turn("user", "hello"), turn("assistant", "yes"), turn("user", "who are you?")]
    for name in ("auto", "chatml"):
        segments = chat_template(name, loaded, "tiny").render({"messages": [*messages, turn("assistant", "X")]})
        whole = "".join(segment.text for segment in segments)
        prompt = loaded.decode(PromptEncoder(loaded, "tiny", name).ids({"messages": messages}))
        assert whole.startswith(f"{prompt}X"), "as training renders it, up to the answer"


def test_batches_skip_what_is_done_and_count_rows() -> None:
    rows = [RawRow(place, place + 1, f'"{place}"') for place in range(10)]
    found = [table.to_pylist()[0] for table in batches_of(rows, 3, [(2, 4), (7, 8)], 3)]
    assert [(batch["start"], batch["index"]) for batch in found] == [
        (0, [0, 1]),
        (4, [4, 5, 6]),
        (8, [8, 9]),
        (10, []),
    ]
    assert [batch["num_rows"] for batch in found] == [-1, -1, -1, 10]
    few = [table.to_pylist()[0] for table in batches_of(rows, 3, [], 3, max_rows=4)]
    assert [(batch["start"], len(batch["index"]), batch["num_rows"]) for batch in few] == [
        (0, 3, -1),
        (3, 1, -1),
        (4, 0, 4),
    ]
    assert next(iter(batches_of(rows, 3, [], 3, max_rows=0))).to_pylist()[0]["num_rows"] == 0


class Torn(io.BytesIO):
    """A disk that gives no more than a few lines."""

    def readline(self, size: int | None = -1, /) -> bytes:
        found = super().readline(size)
        if self.tell() > 100:
            raise OSError(errno.EIO, "Input/output error")
        return found


def test_a_file_that_cannot_be_read_on_is_not_finished(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    text = "".join(f'{{"text": "row {row:03}"}}\n' for row in range(50))
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(text)
    files = list_files([SourceSection(path=str(tmp_path))])

    def brought(max_rows: int | None = None) -> list[tuple[int, int, int, int]]:
        tables = read_files(pa.table({"numbers": [[0, 1]]}), files, {}, batch_size=3, max_rows=max_rows)
        found = [table.to_pylist()[0] for table in tables]
        return [(one["file"], one["start"], len(one["index"]), one["num_rows"]) for one in found]

    whole = brought()
    with monkeypatch.context() as patch:
        patch.setattr(
            readers,
            "open_bytes",
            lambda path: Torn(text.encode()) if path.endswith("a.jsonl") else io.BytesIO(text.encode()),
        )
        torn = brought()
        assert torn[:2] == [(0, 0, 3, -1), (0, 3, 2, -1)]
        assert torn[2:] == [one for one in whole if one[0] == 1]
        assert brought(max_rows=60) == torn[:2]
        assert "a.jsonl: cannot be read: Input/output error. Its other rows wait" in caplog.text


def test_a_damaged_file_is_a_fault_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:40])
    last = list(readers.read_rows(str(path)))[-1]
    assert (last.index, last.text, last.unread) == (-1, None, False)
    assert list(batches_of([last], 0, [], 3))[-1]["num_rows"][0].as_py() == 1


def test_an_integer_of_too_many_digits_is_a_fault_of_its_row() -> None:
    reader = QuestionReader("auto", {}, "auto", {}, None, "last")
    with pytest.raises(RowProblem, match="holds an integer of too many digits"):
        reader.load('{"text": "a", "id": ' + "9" * 5000 + "}")


@pytest.mark.parametrize("available", [0, 1, 3, 4])
def test_a_cluster_with_too_few_gpus_is_not_taken_for_one_without(available: int) -> None:
    given = {"model": "m", "prompts": ["a"], "num_replicas": 2, "engine": {"tensor_parallel_size": 2}}
    config = GenerateConfig.model_validate(given)
    if available in (0, 4):
        assert has_gpus(available, config) == (available == 4)
    else:
        with pytest.raises(ConfigError, match=f"2 engines of 2 GPUs need 4, and the cluster has {available}"):
            has_gpus(available, config)


def test_what_is_nearly_a_setting_is_no_prompt() -> None:
    for item in ("temprature=0.7", "max-tokens=5", "enginee.max_num_seqs=3"):
        with pytest.raises(ConfigError, match=r"Did you mean (temperature|max_tokens|engine)"):
            _is_setting(item)
    assert [_is_setting(item) for item in ("temperature=1", "engine.a=1", "x=3", "Is a=b?", "modeling")] == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_seeds_depend_on_the_row_alone_and_leave_room_for_n() -> None:
    assert row_seed(1, "a") == row_seed(1, "a")
    assert len({row_seed(seed, key) for seed in range(3) for key in range(1000)}) == 3000
    assert all(0 <= row_seed(0, key) < 2**62 for key in range(1000))


def test_progress_speaks_now_and_then_and_knows_what_is_left() -> None:
    now = [0.0]
    progress = Progress(100, rows=40, interval_s=10, clock=lambda: now[0])
    assert progress.tokens_per_second(0) is None
    now[0] = 60.0  # the engine was ready at 55
    assert progress.update(50, 500, 0, 5.0) is None
    now[0] = 64.0
    assert progress.update(60, 900, 0, 4.0) is None
    now[0] = 65.0
    assert progress.update(60, 1000, 3, 4.0) == ("60 of 100 rows, 2.0 rows/s, 100 tokens/s, about 20 s left, 3 failed")
    now[0] = 75.0
    assert progress.tokens_per_second(2000) == 100.0


def test_max_rows_counts_over_files_whatever_is_done(tmp_path: Path) -> None:
    for name, count in (("a", 3), ("b", 5), ("c", 2)):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name}{row}"}}\n' for row in range(count)))
    files = list_files([SourceSection(path=str(tmp_path))])
    for done in ({}, {0: [(0, 3)], 1: [(1, 2)]}):
        found = read_files(pa.table({"numbers": [[0, 1, 2]]}), files, done, batch_size=2, max_rows=6)
        batches = [table.to_pylist()[0] for table in found]
        rows = {(batch["file"], batch["start"] + at) for batch in batches for at in range(len(batch["index"]))}
        skipped = {(file, row) for file, ranges in done.items() for start, stop in ranges for row in range(start, stop)}
        assert rows == {(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)} - skipped
        assert {batch["file"]: batch["num_rows"] for batch in batches if batch["num_rows"] >= 0} == {0: 3, 1: 3, 2: 0}


def test_sampling_that_vllm_refuses_is_a_fault_of_the_configuration() -> None:
    """vLLM's own errors are no ValueErrors."""
    config = GenerateConfig(model="m", prompts=("a",), n=10**7, temperature=1.0)
    with pytest.raises(ConfigError, match="sampling: vLLM refuses it"):
        sampling_params(config)
