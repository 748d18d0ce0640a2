"""Offline generation: files are read as they are needed, vLLM engines answer as actors of Ray Data, and this process
alone writes.

Nothing here grows with the rows: batches come and go, the ledger keeps ranges. Answers are joined to rows by file and
number, never by position.
"""

import json
import logging
import math
import os
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raylm.config import GenerateConfig
from raylm.config.engine import check_engine_keys, gpus_of_engine
from raylm.data.files import suffix_of
from raylm.data.prompt import PLAIN
from raylm.data.readers import RawRow
from raylm.data.remote import scheme_of
from raylm.data.sources import SourceFile, list_files
from raylm.data.templates.table import AUTO, read_template
from raylm.data.tokenizer import load_tokenizer
from raylm.errors import ConfigError, DataError, ModelError
from raylm.inference.answers import Answers, Batch
from raylm.inference.engine import RESERVED, engine_environment, speculation_options
from raylm.inference.manifest import describe
from raylm.inference.output import check_output
from raylm.inference.progress import Progress
from raylm.inference.reading import batches_of, read_files
from raylm.inference.worker import PROMPTS, AnswerStage, error_of_json, template_of
from raylm.models.adapter_files import check_folder
from raylm.models.drafts import check_set_once, portable
from raylm.models.folder import as_folder
from raylm.ray_session import ray_session

logger = logging.getLogger(__name__)

_READ_CPUS = 0.25
"""Taken from an engine's CPUs, so that a cluster with no more than those runs both."""
_MAX_ENGINE_RESTARTS = 3
_MAX_CALLS = 256
_READERS, _MAX_READ_TASKS = 4, 256
_WAITING_BYTES = 512 * 2**20
"""Of batches between the stages: reading waits when there are more."""
_REQUESTS_AT_WORK = {"cpu": 256, "gpu": 1024}
"""vLLM's own `max_num_seqs` on a large device; more batches than fill it only wait in the engine."""


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """Where the answers lie (docs/generate.md) and their counts.

    prompts: rows, those included that a former start had done; tokens: of the answers; failed: kind of fault -> rows,
    which lie in the output with their reason; resumed: rows of former starts; tokens_per_second: of this start,
    from when the first answers were asked for; None where none came.
    """

    output: str
    prompts: int
    tokens: int
    prompt_tokens: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    resumed: int = 0
    tokens_per_second: float | None = None


def run_generation(config: GenerateConfig) -> GenerateResult:
    """Answers every row of the configuration. Raises RaylmError before an engine loads where it can."""
    check_output(config.output)
    check_engine_keys(config.engine, RESERVED)
    check_set_once(config.speculation, config.engine)
    files = list_files(config.data, "the setting data")
    _check_output_is_no_input(config, files)
    folder = as_folder(config.model)
    _check_templates(config, folder, files)
    if config.adapter is not None:
        config = config.model_copy(update={"adapter": str(Path(config.adapter).expanduser().absolute())})
        check_folder(str(config.adapter), folder)
    if config.speculation is not None:
        has_drafter = config.speculation.row.drafter is not None
        config = config.model_copy(update={"speculation": portable(config.speculation)})
        if has_drafter:
            speculation_options(config, folder, use_gpu=True)  # a draft that does not fit is refused before Ray starts
    numbers = [*([PROMPTS] if config.prompts else []), *range(len(files))]
    with Answers(
        config.output,
        describe(config, folder, files),
        shard_kind=config.shard_format,
        shard_rows=config.shard_rows,
        overwrite=config.overwrite,
    ) as answers:
        resumed, rate = answers.totals.rows, None
        if not answers.is_finished and answers.ledger.unfinished(numbers):
            if resumed:
                logger.info("%s: going on after %d rows", config.output, resumed)
            rate = _generate(config, folder, files, answers)
        answers.finish(numbers)
        totals = answers.totals
        if not config.data:
            answers.discard()
    failed = dict(totals.failed)
    return GenerateResult(config.output, totals.rows, totals.tokens, totals.prompt_tokens, failed, resumed, rate)


def _check_output_is_no_input(config: GenerateConfig, files: Sequence[SourceFile]) -> None:
    output = Path(config.output).expanduser().resolve()
    for file in files:
        if not scheme_of(file.path) and (Path(file.path) == output or output in Path(file.path).parents):
            raise ConfigError("output", f"{config.output} is where {file.path} is read from.", "Choose another.")
    for source in config.data:
        if not scheme_of(source.path) and Path(source.path).expanduser().resolve() in output.parents:
            raise ConfigError("output", f"{config.output} lies in {source.path}, which is read.", "Choose another.")


def _check_templates(config: GenerateConfig, folder: str, files: Sequence[SourceFile]) -> None:
    """Raises DataError for an unknown template, ModelError for a model without one where its own is asked for."""
    tokenizer = load_tokenizer(folder)
    for name in sorted({template_of(config, file) for file in [*([None] if config.prompts else []), *files]}):
        if name == AUTO and not tokenizer.chat_template:
            raise ModelError(
                config.model,
                "its tokenizer has no chat template.",
                "Use a chat model, name a template, or complete plain text with template=none.",
            )
        if name not in (AUTO, PLAIN):
            read_template(name)


def _generate(config: GenerateConfig, folder: str, files: Sequence[SourceFile], answers: Answers) -> float | None:
    """Answers what is missing, and returns tokens a second. Raises what stops the engines, and DataError for a fault
    with on_error=stop."""
    ledger = answers.ledger
    progress = Progress(None, rows=ledger.totals.rows, tokens=ledger.totals.tokens)
    threading.Thread(target=_count, args=(config, files, progress), daemon=True).start()
    cpus = max(os.cpu_count() or 1, config.num_replicas * config.num_cpus + 1)
    with ray_session(config.cluster_address, num_cpus=cpus) as ray:
        for found in _unless_engines_die(_answered(ray, config, folder, files, answers), ray, config.model):
            if found["stopped"]:
                raise error_of_json(found["stopped"])
            if found["num_rows"] >= 0:
                answers.end_file(found["file"], found["num_rows"])
                continue
            if found["fault"] and config.on_error == "stop":
                place, problem = json.loads(found["fault"])
                raise DataError(place, problem, "Mend the row, or set on_error=keep; the same command goes on.")
            answers.add(_batch(found))
            totals = ledger.totals
            progress.update(totals.rows, totals.tokens, totals.failed.total(), found["seconds"])
    return progress.tokens_per_second(ledger.totals.tokens)


def _answered(
    ray: Any, config: GenerateConfig, folder: str, files: Sequence[SourceFile], answers: Answers
) -> Iterator[dict[str, Any]]:
    """Rows of ANSWERED, in the order in which they get ready."""
    gpus = gpus_of_engine(config.engine)
    use_gpu = has_gpus(ray.cluster_resources().get("GPU", 0), config)
    environment = engine_environment(config.kv_cache_gib, use_gpu=use_gpu)
    if not use_gpu:
        environment["OMP_NUM_THREADS"] = str(config.num_cpus)
    with warnings.catch_warnings():
        # Ray 2.60 announces that `max_restarts` will have another place, and has none yet; without it, a row that
        # kills its engine would do so for ever.
        warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
        dataset = _asked(ray, config, files, answers).map_batches(
            AnswerStage,
            fn_constructor_kwargs={"config": config, "folder": folder, "files": list(files), "use_gpu": use_gpu},
            batch_size=1,
            batch_format="pyarrow",
            compute=_engine_pool(ray, config, use_gpu=use_gpu),
            num_cpus=config.num_cpus - _READ_CPUS,
            num_gpus=gpus if use_gpu else 0,
            max_restarts=_MAX_ENGINE_RESTARTS,
            runtime_env={"env_vars": environment},
        )
    context = dataset.context
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # a batch is a block, and a task: what is ready is on its way at once
    context.execution_options.resource_limits = context.execution_options.resource_limits.copy(
        object_store_memory=_WAITING_BYTES
    )
    stream = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))
    try:
        for table in stream:
            yield from table.to_pylist()
    finally:
        if hasattr(stream, "close"):
            stream.close()


def has_gpus(available: float, config: GenerateConfig) -> bool:
    """Whether the engines run on GPUs: where there is none, they run on CPUs. Raises ConfigError where some are
    missing."""
    each = gpus_of_engine(config.engine)
    needed = config.num_replicas * each
    if 0 < available < needed:
        raise ConfigError(
            "num_replicas",
            f"{config.num_replicas} engines of {each} GPUs need {needed}, and the cluster has {available:g}.",
            "Lower num_replicas or engine.tensor_parallel_size.",
        )
    return available >= needed


def _unless_engines_die(found: Iterator[dict[str, Any]], ray: Any, model: str) -> Iterator[dict[str, Any]]:
    try:
        yield from found
    except ray.exceptions.ActorDiedError as error:
        if error.actor_init_failed:
            raise
        raise ModelError(
            model,
            f"its engine died {1 + _MAX_ENGINE_RESTARTS} times.",
            "Give it more memory, or a smaller engine.max_num_seqs; the same command goes on.",
        ) from None


def _engine_pool(ray: Any, config: GenerateConfig, *, use_gpu: bool) -> Any:
    """Actors that hold so many batches that their engines never run dry between two of them."""
    at_work = int(config.engine.get("max_num_seqs") or _REQUESTS_AT_WORK["gpu" if use_gpu else "cpu"])
    calls = min(_MAX_CALLS, 1 + math.ceil(1.5 * at_work / config.batch_size))
    return ray.data.ActorPoolStrategy(
        size=config.num_replicas,
        max_tasks_in_flight_per_actor=calls,
        max_concurrent_calls_per_actor=calls,
        enable_true_multi_threading=True,
    )


def _asked(ray: Any, config: GenerateConfig, files: Sequence[SourceFile], answers: Answers) -> Any:
    """A dataset of what is not answered yet, a batch a row."""
    ledger = answers.ledger
    parts = []
    if config.prompts:
        raw = (RawRow(place, 0, json.dumps({"text": text})) for place, text in enumerate(config.prompts))
        parts.append(
            ray.data.from_arrow(
                list(batches_of(raw, PROMPTS, list(ledger.done[PROMPTS]), config.batch_size, config.max_rows))
            )
        )
    limit = None if config.max_rows is None else max(0, config.max_rows - len(config.prompts))
    open_files = ledger.unfinished(range(len(files)))
    if open_files:
        groups = [list(range(len(files)))] if limit is not None else _groups(open_files)
        parts.append(
            ray.data.from_items([{"numbers": group} for group in groups], override_num_blocks=len(groups)).map_batches(
                read_files,
                fn_kwargs={
                    "files": list(files),
                    "done": {number: list(ledger.done[number]) for group in groups for number in group},
                    "batch_size": config.batch_size,
                    "max_rows": limit,
                },
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=_READ_CPUS,
                compute=ray.data.TaskPoolStrategy(size=min(_READERS, len(groups))),
            )
        )
    return parts[0].union(*parts[1:]) if len(parts) > 1 else parts[0]


def _groups(numbers: Sequence[int]) -> list[list[int]]:
    """Neighbours together, so that a task of Ray is worth its while where there are thousands of files."""
    size = -(-len(numbers) // _MAX_READ_TASKS)
    return [list(numbers[start : start + size]) for start in range(0, len(numbers), size)]


def _batch(found: Mapping[str, Any]) -> Batch:
    names = ("file", "start", "stop", "lines", "answers", "prompt_tokens", "tokens")
    return Batch(**{name: found[name] for name in names}, failed=json.loads(found["failed"]))


def _count(config: GenerateConfig, files: Sequence[SourceFile], progress: Progress) -> None:
    """Tells the progress how many rows there are, where that is cheap to find out."""
    counts = [len(config.prompts)]
    for file in files:
        count = _cheap_count(file)
        if count is None:
            return
        counts.append(count)
    progress.num_rows = min(sum(counts), config.max_rows or sum(counts))


def _cheap_count(file: SourceFile) -> int | None:
    """Rows of a local Parquet file, or lines of a local file of lines that is not compressed."""
    if scheme_of(file.path):
        return None
    try:
        if suffix_of(file.path) == ".parquet":
            import pyarrow.parquet as pq

            return int(pq.read_metadata(file.path).num_rows)
        if Path(file.path).suffix.lower() in (".jsonl", ".ndjson", ".txt"):
            with open(file.path, "rb") as stream:
                return sum(piece.count(b"\n") for piece in iter(lambda: stream.read(2**20), b""))
    except Exception:  # the reader says what is wrong with it
        return None
    return None
