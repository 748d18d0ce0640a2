"""What the stage makes of rows and of an engine's outputs, with outputs of vLLM's kind and no engine."""

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from raylm.config import GenerateConfig
from raylm.data.readers import read_rows
from raylm.data.sources import list_files
from raylm.inference.engine import row_seed
from raylm.inference.reading import batches_of
from raylm.inference.worker import Answerer
from tests.tiny import build_tokenizer

Lines = list[dict[str, Any]]
INFINITY = float("inf")


class Loop:
    """In place of our `EngineLoop`: every prompt is answered with the same token. seeds: of what was asked, in turn."""

    max_model_len = 128
    lost_a_process = False

    def __init__(self, logprobs: dict[int, float] | None = None) -> None:
        self.seeds: list[int] = []
        self._logprobs = logprobs

    def check(self, params: Any) -> None:
        pass

    def ask(self, prompt_token_ids: list[int], params: Any) -> "Future[Any]":
        from vllm.logprobs import Logprob
        from vllm.outputs import CompletionOutput, RequestOutput

        self.seeds.append(params.seed)
        places = None
        if self._logprobs is not None:
            ranked = sorted(self._logprobs, key=lambda token: -self._logprobs[token])  # type: ignore[index]
            places = [
                {token: Logprob(self._logprobs[token], rank + 1, f"t{token}") for rank, token in enumerate(ranked)}
            ]
        one = CompletionOutput(0, "yes", [40], cumulative_logprob=None, logprobs=places, finish_reason="stop")
        future: Future[Any] = Future()
        future.set_result(RequestOutput("0", None, prompt_token_ids, None, [one], finished=True))
        return future


def answered(folder: Path, files: dict[str, str], loop: Loop, tokenizer: Any, **settings: Any) -> Lines:
    """The lines for files given as name and text, read strictly: JSON has no NaN and no infinity."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    data = [{"path": str(folder / name)} for name in files]
    config = GenerateConfig.model_validate({"model": "tiny", "data": data, "max_tokens": 4, **settings})
    found = list_files(config.data)
    answerer = Answerer(loop, config, tokenizer, found)  # type: ignore[arg-type]
    tables = [table for number, file in enumerate(found) for table in batches_of(read_rows(file.path), number, (), 4)]
    batches = [answerer.answered(table.to_pylist()[0]) for table in tables]

    def strict(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=strict) for batch in batches for line in batch["lines"].splitlines()]


def row(**columns: Any) -> str:
    return json.dumps({"question": "hello", **columns}) + "\n"


def test_half_of_a_surrogate_pair_in_an_id_ends_no_batch(tmp_path: Path, tokenizer: Any) -> None:
    """JSON may hold one, UTF-8 may not; the row's seed is made of it all the same."""
    loop = Loop()
    texts = {"a.jsonl": '{"id": "x\\ud83d", "question": "hello"}\n' + row(id="whole")}
    broken, whole = answered(tmp_path, texts, loop, tokenizer, temperature=1.0, seed=3)
    assert (broken["id"], broken["answer"]) == ("x?", "yes")
    assert (whole["id"], whole["answer"]) == ("whole", "yes")
    assert loop.seeds == [row_seed(3, "x\ud83d"), row_seed(3, "whole")]
    assert row_seed(3, "x\ud83d") != row_seed(3, "x\ud83e")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ messages[0]['content'] + 1 }}", "can only concatenate str"),
        ("{{ messages[0]['content'][99]['x'] }}", "has no element 99"),
        ("{{ 1 // (messages[0]['content'] | length - 5) }}", "ZeroDivisionError"),
        ("{{ raise_exception('only in pairs') }}", "only in pairs"),
    ],
)
def test_a_template_that_fails_on_a_row_fails_that_row(tmp_path: Path, template: str, says: str) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['content'] == 'hello' %}" + template + "{% else %}{{ messages[0]['content'] }}{% endif %}"
    )
    texts = {"a.jsonl": row() + row(question="who are you?")}
    failed, fine = answered(tmp_path, texts, Loop(), tokenizer)
    assert (failed["answer"], failed["error_kind"]) == (None, "template")
    assert says in failed["error"]
    assert "\n" not in failed["error"]
    assert (fine["answer"], fine["prompt_tokens"]) == ("yes", len(tokenizer("who are you?")["input_ids"]))


def test_impossible_tokens_have_a_finite_log_probability(tmp_path: Path, tokenizer: Any) -> None:
    """Tokens outside a structure have none; vLLM's server writes the same bound."""
    loop = Loop({40: -0.5, 41: -INFINITY})
    (line,) = answered(tmp_path, {"a.jsonl": row()}, loop, tokenizer, logprobs=2)
    top = [{"token": "t40", "logprob": -0.5}, {"token": "t41", "logprob": -9999.0}]
    assert line["logprobs"] == [{"token": "t40", "logprob": -0.5, "top": top}]
    (line,) = answered(tmp_path, {"a.jsonl": row()}, Loop({40: -INFINITY}), tokenizer, logprobs=1)
    assert line["logprobs"][0]["logprob"] == -9999.0


def test_files_of_the_same_name_draw_apart_and_rows_with_ids_by_these(tmp_path: Path, tokenizer: Any) -> None:
    def seeds(files: dict[str, str]) -> list[int]:
        loop = Loop()
        answered(tmp_path, files, loop, tokenizer, temperature=1.0)
        return loop.seeds

    twice = seeds({"a/data.jsonl": row() * 2, "b/data.jsonl": row() * 2})
    assert len(set(twice)) == 4
    assert seeds({"a/data.jsonl": row() * 2}) == twice[:2]
    named = {"a/data.jsonl": row(id="x"), "b/data.jsonl": row(id="x")}
    assert len(set(seeds(named))) == 1
