"""Offline generation: vLLM in Ray Data actors, answers in the order of the prompts.

Answers are joined to prompts by their number, never by position, and written to a temporary file that is renamed when
all are there.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raylm.config import GenerateConfig
from raylm.data.prompt import PromptEncoder
from raylm.data.rows import FileRow, iterate_rows
from raylm.data.schema import Message, RowProblem
from raylm.data.tokenizer import load_tokenizer
from raylm.errors import DataError, ModelError, RaylmError
from raylm.inference.engine import engine_environment, load_engine
from raylm.models.drafts import engine_options, portable
from raylm.models.folder import as_folder
from raylm.ray_session import ray_session


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """Where the answers lie: JSONL with `id`, `messages`, `answer`, `finish_reason`, `prompt_tokens`, `tokens`."""

    output: str
    prompts: int
    tokens: int


def run_generation(config: GenerateConfig) -> GenerateResult:
    """Answers every prompt of the configuration. Raises RaylmError before an engine loads where it can."""
    output = Path(config.output).expanduser()
    if not output.parent.is_dir():
        raise DataError(str(output), "its folder does not exist.", "Create it, or choose another output.")
    folder = as_folder(config.model)
    if not load_tokenizer(folder).chat_template:
        raise ModelError(config.model, "its tokenizer has no chat template.", "Use a chat model.")
    if config.speculation is not None and config.speculation.row.drafter is not None:
        _speculation(config, folder, use_gpu=True)  # what does not fit the model is said before Ray starts
    conversations = list(_conversations(config))
    with ray_session(config.cluster_address, num_cpus=max(os.cpu_count() or 1, config.num_replicas + 1)) as ray:
        answers = _answer(ray, config, folder, conversations)
    return _write(output, conversations, answers)


def _conversations(config: GenerateConfig) -> Iterator[list[Message]]:
    system: list[Message] = [{"role": "system", "content": config.system}] if config.system else []
    for prompt in config.prompts:
        yield [*system, {"role": "user", "content": prompt}]
    for found in iterate_rows(config.data, {}):
        if found.row is None:
            raise DataError(found.where, found.problem)
        messages = _question(found)
        yield messages if messages[0]["role"] == "system" else [*system, *messages]


def _question(found: FileRow) -> list[Message]:
    """What a row asks, without the answer it may hold."""
    row = found.row
    assert row is not None
    if row.kind in ("text", "text2text"):
        return [{"role": "user", "content": row.value if row.kind == "text" else row.value[0]}]
    if row.kind == "conversation":
        messages: list[Message] = row.value["messages"]
    elif row.kind in ("preference", "kto"):
        messages = row.value["prompt"]
    else:
        raise DataError(found.where, f"is a row of kind {row.kind}, which asks nothing.")
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise DataError(found.where, "holds nothing to answer.")
    return messages


def _answer(ray: Any, config: GenerateConfig, folder: str, conversations: list[list[Message]]) -> dict[int, Any]:
    items = [{"id": number, "messages": json.dumps(messages)} for number, messages in enumerate(conversations)]
    section = None if config.speculation is None else portable(config.speculation)
    has_gpu = ray.cluster_resources().get("GPU", 0) >= config.num_replicas
    dataset = ray.data.from_items(items).map_batches(
        _Engine,
        fn_constructor_kwargs={
            "config": config.model_copy(update={"speculation": section}),
            "folder": folder,
            "use_gpu": has_gpu,
        },
        batch_size=config.batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=config.num_replicas),
        num_cpus=1,
        num_gpus=1 if has_gpu else 0,
        runtime_env={"env_vars": engine_environment(config.kv_cache_gib, use_gpu=has_gpu)},
    )
    dataset.context.enable_progress_bars = False
    try:
        return {row["id"]: row for row in dataset.iter_rows()}
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        while cause is not None and not isinstance(cause, RaylmError):
            cause = getattr(cause, "cause", None) or cause.__cause__
        raise cause or error from None


def _speculation(config: GenerateConfig, folder: str, *, use_gpu: bool) -> dict[str, Any]:
    return engine_options(config.speculation, folder, use_gpu=use_gpu, max_model_len=config.max_model_len)


class _Engine:
    """Loads vLLM in the worker."""

    def __init__(self, config: GenerateConfig, folder: str, use_gpu: bool) -> None:
        from vllm import SamplingParams

        self._engine = load_engine(
            folder,
            dtype=config.dtype,
            max_model_len=config.max_model_len,
            seed=config.seed,
            use_gpu=use_gpu,
            options=_speculation(config, folder, use_gpu=use_gpu),
        )
        self._prompts = PromptEncoder(load_tokenizer(folder), config.model)
        self._sampling = SamplingParams(
            max_tokens=config.max_tokens, temperature=config.temperature, top_p=config.top_p, seed=config.seed
        )

    def _ids(self, number: int, messages: list[Message]) -> list[int]:
        try:
            return self._prompts.ids({"messages": messages})
        except RowProblem as problem:
            raise DataError(f"prompt {number}", str(problem)) from None

    def __call__(self, batch: pa.Table) -> pa.Table:
        conversations = [json.loads(text) for text in batch["messages"].to_pylist()]
        prompts = [
            {"prompt_token_ids": self._ids(*item)} for item in zip(batch["id"].to_pylist(), conversations, strict=True)
        ]
        outputs = self._engine.generate(prompts, self._sampling, use_tqdm=False)
        return pa.table(
            {
                "id": batch["id"],
                "answer": [output.outputs[0].text for output in outputs],
                "finish_reason": [output.outputs[0].finish_reason for output in outputs],
                "prompt_tokens": np.array([len(output.prompt_token_ids) for output in outputs]),
                "tokens": np.array([len(output.outputs[0].token_ids) for output in outputs]),
            }
        )


def _write(output: Path, conversations: list[list[Message]], answers: dict[int, Any]) -> GenerateResult:
    assert len(answers) == len(conversations), f"{len(answers)} answers for {len(conversations)} prompts"
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        for number, messages in enumerate(conversations):
            line = {"id": number, "messages": messages, **{k: v for k, v in answers[number].items() if k != "id"}}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    partial.rename(output)
    return GenerateResult(str(output), len(conversations), sum(int(answer["tokens"]) for answer in answers.values()))
