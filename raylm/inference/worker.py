"""The Ray Data stage that answers: batches of raw rows in, batches of lines out. Loads vLLM in the worker.

Several batches are at work at once, each in a thread of its own. A row that cannot be answered is a line with a reason.
"""

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from raylm import errors
from raylm.config import GenerateConfig
from raylm.data.prompt import PromptEncoder
from raylm.data.readers import RawRow, place_in_file
from raylm.data.remote import shown
from raylm.data.schema import Message, RowProblem
from raylm.data.sources import SourceFile
from raylm.data.tokenizer import load_tokenizer
from raylm.errors import ConfigError, ModelError, RaylmError
from raylm.inference.adapter import adapter_request, adapter_settings
from raylm.inference.engine import load_engine, sampling_params, speculation_options
from raylm.inference.loop import EngineLoop, Refused
from raylm.inference.questions import Question, QuestionReader, row_id
from raylm.inference.reading import rows_of

PROMPTS = -1
"""Number of the file that `config.prompts` stand for."""


@dataclass(slots=True)
class _Row:
    """A row on its way. made: outputs of the engine, one a turn; error: kind and sentence."""

    id: str | int
    key: str | int
    place: str
    head: dict[str, Any]
    question: Question | None = None
    history: list[Message] = field(default_factory=list)
    made: list[Any] = field(default_factory=list)
    error: tuple[str, str] | None = None


class AnswerStage:
    """Loads the engine and the tokenizer, then answers a batch a call, of several threads at once.

    What the user can mend travels as data, in `stopped`: Ray keeps of an exception in a constructor only the text.
    """

    def __init__(self, config: GenerateConfig, folder: str, files: Sequence[SourceFile], use_gpu: bool) -> None:
        self._stopped = ""
        try:
            llm = load_engine(
                folder,
                dtype=config.dtype,
                max_model_len=config.max_model_len,
                seed=config.seed,
                use_gpu=use_gpu,
                options=stage_options(config, folder, use_gpu=use_gpu),
            )
            self._answerer = Answerer(
                EngineLoop(llm.llm_engine, adapter_request(config.adapter)), config, load_tokenizer(folder), files
            )
        except RaylmError as error:
            self._stopped = error_to_json(error)

    def __call__(self, table: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._answered(batch) for batch in table.to_pylist()], schema=ANSWERED)

    def _answered(self, batch: dict[str, Any]) -> dict[str, Any]:
        if not self._stopped:
            try:
                return self._answerer.answered(batch)
            except RaylmError as error:
                self._stopped = error_to_json(error)
        nothing = {field.name: "" if pa.types.is_string(field.type) else 0 for field in ANSWERED}
        return {**nothing, "lines": b"", "fault": "", "stopped": self._stopped}


def stage_options(config: GenerateConfig, folder: str, *, use_gpu: bool) -> dict[str, Any]:
    """Options of `load_engine` for a configuration. Raises ConfigError and ModelError for what does not fit."""
    return {
        **adapter_settings(config.adapter, folder),
        **speculation_options(config, folder, use_gpu=use_gpu),
        **config.engine,
    }


def error_to_json(error: RaylmError) -> str:
    """What `error_of_json` makes the same error of."""
    return json.dumps([type(error).__name__, error.where, error.problem, error.remedy])


def error_of_json(text: str) -> RaylmError:
    """The error that `error_to_json` was given."""
    name, *parts = json.loads(text)
    found: RaylmError = getattr(errors, name)(*parts)
    return found


class Answerer:
    """Batches of rows into lines, with an engine that others may ask as well."""

    def __init__(self, engine: EngineLoop, config: GenerateConfig, tokenizer: Any, files: Sequence[SourceFile]) -> None:
        """Raises ConfigError for sampling that vLLM refuses, DataError and ModelError for templates."""
        self._config, self._files, self._engine = config, files, engine
        try:
            engine.check(sampling_params(config))
        except Refused as error:
            where = "structured" if config.structured else "sampling"
            raise ConfigError(where, f"vLLM refuses it: {error}") from None
        self._decode = tokenizer.decode
        names = {template_of(config, file) for file in [*([None] if config.prompts else []), *files]}
        self._encoders = {name: PromptEncoder(tokenizer, config.model, name) for name in names}
        self._readers = {number: reader_of(config, file) for number, file in enumerate(files)}
        self._readers[PROMPTS] = reader_of(config, None)
        self._encoding = threading.Lock()

    def answered(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A row of ANSWERED for a batch of `raylm.inference.reading`. Raises ModelError when the engine has stopped."""
        file, start, began = batch["file"], batch["start"], time.monotonic()
        rows = [self._read(file, start + at, raw) for at, raw in enumerate(rows_of(batch))]
        waiting = [row for row in rows if row.error is None]
        while waiting:
            asked = [(row, self._ask(row, file)) for row in waiting]
            waiting = [row for row, future in asked if self._take(row, future)]
        failed = Counter(row.error[0] for row in rows if row.error)
        fault = next((row for row in rows if row.error), None)
        outputs = [output for row in rows for output in row.made]
        lines = "".join(f"{json.dumps(self._line(row), ensure_ascii=False)}\n" for row in rows)
        return {
            "file": file,
            "start": start,
            "stop": start + len(rows),
            "num_rows": batch["num_rows"],
            "lines": lines.encode(errors="replace"),  # JSON may hold half of a surrogate pair, UTF-8 may not
            "failed": json.dumps(failed),
            "stopped": "",
            "fault": json.dumps([fault.place, fault.error[1]]) if fault and fault.error else "",
            "answers": sum(len(output.outputs) for row in rows if not row.error for output in row.made),
            "prompt_tokens": sum(len(output.prompt_token_ids) for output in outputs),
            "tokens": sum(len(one.token_ids) for output in outputs for one in output.outputs),
            "seconds": time.monotonic() - began,
        }

    def _read(self, file: int, place: int, raw: RawRow) -> _Row:
        if file == PROMPTS:
            row = _Row(place, place, f"prompt {place}", {})
        else:
            path = shown(self._files[file].path)
            name, number = (path, raw.index) if raw.index >= 0 else (path, None)
            row = _Row(
                f"{path}:{raw.index}" if raw.index >= 0 else path,
                f"{file}:{Path(path).name}:{raw.index}",  # names repeat: a/data.jsonl and b/data.jsonl
                place_in_file(self._files[file].path, raw.index, raw.line),
                {"file": name, "row": number},
            )
        if raw.text is None:
            row.error = "malformed", raw.problem
            return row
        reader = self._readers[file]
        try:
            loaded = reader.load(raw.text)
            own = row_id(loaded)
            if own is not None:
                row.id = row.key = own
            row.question = reader.question(loaded, raw.format)
        except RowProblem as problem:
            row.error = "malformed", str(problem)
            return row
        row.history = list(row.question.messages[: row.question.answers[0]]) if row.question.answers else []
        return row

    def _ask(self, row: _Row, file: int) -> "Future[Any] | None":
        """Asks for the next answer of a row; None, with its error set, where that cannot be."""
        assert row.question is not None
        encoder = self._encoders[template_of(self._config, None if file == PROMPTS else self._files[file])]
        try:
            with self._encoding:
                if row.question.text is not None:
                    ids = encoder.text_ids(row.question.text)
                else:
                    tools = {"tools": list(row.question.tools)} if row.question.tools else {}
                    ids = encoder.ids({"messages": row.history, **tools})
        except RowProblem as problem:
            row.error = "template", str(problem)
            return None
        except RaylmError:
            raise
        except Exception as error:  # a template is a program, and may stumble over anything that a row holds
            row.error = "template", f"its template fails: {type(error).__name__}: {_first_line(error)}"
            return None
        if len(ids) >= self._engine.max_model_len:
            row.error = (
                "too_long",
                f"the prompt of {len(ids)} tokens leaves no room within max_model_len={self._engine.max_model_len}.",
            )
            return None
        if not ids:
            row.error = "malformed", "the prompt is empty."
            return None
        # The first turn draws as the only one would.
        key = f"{row.key}#{len(row.made)}" if row.made else row.key
        return self._engine.ask(ids, sampling_params(self._config, key, encoder.stop_token_ids))

    def _take(self, row: _Row, future: "Future[Any] | None") -> bool:
        """Waits for an answer; True where the row asks for another one."""
        if future is None:
            return False
        try:
            output = future.result()
        except Refused as error:
            row.error = "refused", f"vLLM refuses it: {error}"
            return False
        except Exception as error:
            _leave_where_broken(self._engine)
            raise ModelError(
                self._config.model,
                f"its engine has stopped: {type(error).__name__}: {_first_line(error)}",
                "The same command goes on with what is left.",
            ) from None
        row.made.append(output)
        question = row.question
        assert question is not None
        if len(row.made) >= len(question.answers):
            return False
        done, following = question.answers[len(row.made) - 1], question.answers[len(row.made)]
        row.history.append({"role": "assistant", "content": output.outputs[0].text})
        row.history += question.messages[done + 1 : following]
        return True

    def _line(self, row: _Row) -> dict[str, Any]:
        question = row.question
        line: dict[str, Any] = {"id": row.id, **row.head}
        if question is not None:
            line |= {"prompt": question.text} if question.text is not None else {"messages": row.history}
            if question.tools:
                line["tools"] = list(question.tools)
        if row.error:
            line |= {"answer": None, "error": row.error[1], "error_kind": row.error[0]}
        elif self._config.n == 1:
            line |= self._answer(row.made[-1].outputs[0])
            line["prompt_tokens"] = len(row.made[-1].prompt_token_ids)
        else:
            line["answers"] = [self._answer(one) for one in row.made[-1].outputs]
            line["prompt_tokens"] = len(row.made[-1].prompt_token_ids)
        if self._config.turns == "all" and row.made:
            line["turns"] = [
                {**self._answer(output.outputs[0]), "prompt_tokens": len(output.prompt_token_ids)}
                for output in row.made
            ]
        return line

    def _answer(self, output: Any) -> dict[str, Any]:
        found = {"answer": output.text, "finish_reason": output.finish_reason, "tokens": len(output.token_ids)}
        if output.logprobs is not None:
            found["logprobs"] = [
                self._logprob(token, likely) for token, likely in zip(output.token_ids, output.logprobs, strict=True)
            ]
        return found

    def _logprob(self, token: int, likely: dict[int, Any]) -> dict[str, Any]:
        top = sorted(
            (
                place
                for place in likely.items()
                if place[1].rank is not None and place[1].rank <= (self._config.logprobs or 0)
            ),
            key=lambda place: place[1].rank,
        )
        return {
            "token": self._text(token, likely[token]),
            "logprob": _finite(likely[token].logprob),
            "top": [{"token": self._text(*place), "logprob": _finite(place[1].logprob)} for place in top],
        }

    def _text(self, token: int, logprob: Any) -> str:
        return logprob.decoded_token if logprob.decoded_token is not None else str(self._decode([token]))


ANSWERED = pa.schema(
    [
        ("file", pa.int32()),
        ("start", pa.int64()),
        ("stop", pa.int64()),
        ("num_rows", pa.int64()),
        ("lines", pa.large_binary()),
        ("failed", pa.string()),
        ("fault", pa.large_string()),
        ("stopped", pa.string()),
        ("answers", pa.int64()),
        ("prompt_tokens", pa.int64()),
        ("tokens", pa.int64()),
        ("seconds", pa.float64()),
    ]
)
"""failed: JSON, kind -> rows; fault: JSON of place and problem of the first row that failed, or
empty; stopped: why the engine answers nothing more, or empty; seconds: from the first request to the last answer."""


def template_of(config: GenerateConfig, file: SourceFile | None) -> str:
    """The template of a file, or of `config.prompts`."""
    return (file.template if file else None) or config.template


def reader_of(config: GenerateConfig, file: SourceFile | None) -> QuestionReader:
    """How the rows of a file, or of `config.prompts`, are read."""
    return QuestionReader(
        format=file.format if file else "text",
        columns=file.columns if file else {},
        template=template_of(config, file),
        role_map=config.role_map,
        system=config.system,
        turns=config.turns,
    )


def _finite(logprob: float) -> float:
    """JSON has no infinity, which tokens outside a structure get; the bound is that of vLLM's server."""
    return max(logprob, -9999.0)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _leave_where_broken(loop: EngineLoop) -> None:
    """Ends this process where a process of the engine has died: Ray starts another and asks it again."""
    if loop.lost_a_process:
        os._exit(1)
