"""The stage that answers, with a real engine in one actor that all tests of this file ask."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raylm.config import GenerateConfig
from raylm.data.prompt import PromptEncoder
from raylm.data.readers import read_rows
from raylm.data.sources import list_files
from raylm.errors import ConfigError, RaylmError
from raylm.inference.engine import engine_environment
from raylm.inference.reading import batches_of

MAX_MODEL_LEN = 128


class Holder:
    """An engine, and as many configurations as are asked for."""

    def __init__(self, folder: str) -> None:
        from raylm.data.tokenizer import load_tokenizer
        from raylm.inference.engine import load_engine
        from raylm.inference.loop import EngineLoop

        # Random weights would write white space for ever, which JSON allows.
        options = {"structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}}
        llm = load_engine(folder, dtype="float32", max_model_len=MAX_MODEL_LEN, seed=0, use_gpu=False, options=options)
        self._loop, self._tokenizer = EngineLoop(llm.llm_engine), load_tokenizer(folder)

    def answered(self, config: GenerateConfig, batch_size: int, done: list[tuple[int, int]]) -> Any:
        """Rows of ANSWERED, of several batches at once, and the mean number of requests in a step; or a RaylmError."""
        from concurrent.futures import ThreadPoolExecutor

        from raylm.inference.worker import PROMPTS, Answerer

        files = list_files(config.data)
        try:
            answerer = Answerer(self._loop, config, self._tokenizer, files)
        except RaylmError as error:
            return error
        tables = [
            table
            for number, file in enumerate(files)
            for table in batches_of(read_rows(file.path), number, done, batch_size)
        ]
        assert PROMPTS not in range(len(files))
        steps, scheduled = self._loop.steps, self._loop.scheduled
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(answerer.answered, [table.to_pylist()[0] for table in tables]))
        return found, (self._loop.scheduled - scheduled) / max(1, self._loop.steps - steps)


@pytest.fixture(scope="module")
def holder(ray_cluster: Any, asked_model_dir: Path) -> Iterator[Any]:
    environment = {"env_vars": engine_environment(1.0, use_gpu=False)}
    actor = ray_cluster.remote(Holder).options(runtime_env=environment, num_cpus=1).remote(str(asked_model_dir))
    yield actor
    ray_cluster.kill(actor)


@pytest.fixture
def answer(holder: Any, ray_cluster: Any, asked_model_dir: Path, tmp_path: Path) -> Any:
    """Writes rows as JSON Lines and returns the lines of their answers, with the counts in `answer.counts`."""

    def run(rows: list[Any], *, batch_size: int = 4, done: Any = (), **settings: Any) -> list[dict[str, Any]]:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
        source = {"path": str(path), **settings.pop("source", {})}
        config = GenerateConfig.model_validate(
            {"model": str(asked_model_dir), "data": [source], "max_tokens": 6, **settings}
        )
        found = ray_cluster.get(holder.answered.remote(config, batch_size, list(done)))
        if isinstance(found, RaylmError):
            raise found
        batches, run.mean_batch = found  # type: ignore[attr-defined]
        run.batches = batches  # type: ignore[attr-defined]
        return [json.loads(line) for batch in batches for line in batch["lines"].splitlines()]

    return run


def user(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


def test_every_row_gets_a_line_and_a_fault_its_reason(answer: Any, tokenizer: Any) -> None:
    rows = [
        {"id": "own", **user("hello")},
        "{not json\n",
        user("why " * 200),
        {"id": 3, "messages": [{"role": "bot", "content": "a"}]},
        user("who are you?"),
        '{"text": "\\ud800"}\n',
        {"question": "yes"},
    ]
    lines = answer(rows)
    path = lines[1]["file"]
    assert [line["id"] for line in lines] == ["own", f"{path}:1", f"{path}:2", 3, f"{path}:4", f"{path}:5", f"{path}:6"]
    assert [line["row"] for line in lines] == list(range(7))
    assert [line.get("error_kind") for line in lines] == [
        None, "malformed", "too_long", "malformed", None, "malformed", None,
    ]  # fmt: skip
    assert "not valid JSON" in lines[1]["error"]
    assert f"leaves no room within max_model_len={MAX_MODEL_LEN}" in lines[2]["error"]
    assert "role 'bot'" in lines[3]["error"]
    assert all(line["answer"] is None for line in lines if "error" in line)
    for line in (lines[0], lines[4], lines[6]):
        prompt = PromptEncoder(tokenizer, "tiny").ids({"messages": line["messages"]})
        assert line["prompt_tokens"] == len(prompt)
        assert 0 < line["tokens"] <= 6
        assert line["finish_reason"] in ("stop", "length")
    totals = {name: sum(batch[name] for batch in answer.batches) for name in ("answers", "tokens", "prompt_tokens")}
    assert totals == {
        "answers": 3,
        "tokens": sum(line.get("tokens", 0) for line in lines),
        "prompt_tokens": sum(line.get("prompt_tokens", 0) for line in lines),
    }
    assert [batch["num_rows"] for batch in answer.batches] == [-1, -1, 7]
    place, problem = json.loads(answer.batches[0]["fault"])
    assert place.endswith("rows.jsonl: line 2")
    assert "not valid JSON" in problem


def test_several_answers_are_drawn_from_the_rows_own_seed(answer: Any) -> None:
    rows = [{"id": f"r{number}", **user(f"question {number % 3}")} for number in range(8)]
    options = {"n": 2, "temperature": 1.0, "seed": 5, "stop": ["zz"], "top_k": 50, "min_p": 0.01, "logprobs": 2}
    lines = answer(rows, **options)
    assert all(len(line["answers"]) == 2 and "answer" not in line for line in lines)
    texts = [tuple(one["answer"] for one in line["answers"]) for line in lines]
    assert all(first != second for first, second in texts)
    assert len(set(texts)) == len(texts), "the same question draws anew in each row"
    alone = answer(rows, batch_size=1, done=[(0, 5), (6, 8)], **options)
    assert [line["id"] for line in alone] == ["r5"]
    assert alone[0]["answers"] == lines[5]["answers"], "whatever runs beside it"
    assert answer(rows, **{**options, "seed": 6})[0]["answers"] != lines[0]["answers"]
    one = lines[0]["answers"][0]
    assert len(one["logprobs"]) == one["tokens"]
    for place in one["logprobs"]:
        assert place["logprob"] <= 0
        assert [likely["logprob"] for likely in place["top"]] == sorted(
            (likely["logprob"] for likely in place["top"]), reverse=True
        )
        assert len(place["top"]) == 2


def test_each_turn_of_the_assistant_is_made_with_the_history_made_so_far(answer: Any) -> None:
    chat = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "GOLD"},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "GOLD"},
        {"role": "user", "content": "who are you?"},
    ]
    (line,) = answer([{"messages": chat}], turns="all", system="be short")
    assert [message["role"] for message in line["messages"]] == [
        "system", "user", "assistant", "tool", "assistant", "user",
    ]  # fmt: skip
    assert not any(message["content"] == "GOLD" for message in line["messages"])
    assert len(line["turns"]) == 3
    assert line["answer"] == line["turns"][2]["answer"]
    made = [line["messages"][2]["content"], line["messages"][4]["content"], line["answer"]]
    for length, text in zip((2, 4, 6), made, strict=True):
        (alone,) = answer([{"messages": line["messages"][:length]}])
        assert alone["answer"] == text, "each turn is what the same history gets by itself"


def test_structures_hold_for_every_answer_and_faulty_ones_stop_at_once(answer: Any) -> None:
    lines = answer([user("hello"), user("yes")], structured={"regex": "(yes|no){2}"}, temperature=1.0)
    assert all(line["answer"] in ("yesyes", "yesno", "noyes", "nono") for line in lines)
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    (line,) = answer([user("hello")], structured={"json": schema}, max_tokens=60)
    assert json.loads(line["answer"])["a"] in ("x", "y")
    with pytest.raises(ConfigError, match="structured: vLLM refuses it"):
        answer([user("hello")], structured={"regex": "(unclosed"})


def test_plain_text_and_other_templates(answer: Any, tokenizer: Any) -> None:
    (plain,) = answer([{"text": "hello world"}], template="none")
    assert plain["prompt"] == "hello world"
    assert plain["prompt_tokens"] == len(tokenizer("hello world")["input_ids"])
    (chat, refused) = answer(
        [{"q": "hello"}, {"q": "yes", "r": 1}], source={"columns": {"question": "q"}, "template": "### {input_text}:"}
    )
    assert chat["prompt_tokens"] == len(tokenizer("### hello:")["input_ids"])
    assert refused["messages"][0]["content"] == "yes"


def test_batches_share_the_engines_steps(answer: Any) -> None:
    """Batches of two, eight at once: a step works on more rows than a batch holds."""
    answer([user(f"question {number}") for number in range(64)], batch_size=2, max_tokens=24)
    assert answer.mean_batch > 6
