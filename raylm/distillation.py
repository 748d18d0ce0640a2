"""`raylm distill-draft`: a small model that guesses what a model will say, for speculative decoding.

It consists of some of the model's own blocks between its own embeddings and output layer, and is trained on the model's
own answers: what it must learn is the model's habits, not the language. Composes offline generation and training.
"""

import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import raylm.config as configs
from raylm.config.distillation import DistillConfig
from raylm.config.load import load_config
from raylm.config.sections import ModelSection
from raylm.data.prompt import PromptEncoder
from raylm.data.sources import list_files
from raylm.data.tokenizer import load_tokenizer
from raylm.errors import DataError, ModelError
from raylm.inference.acceptance import Acceptance
from raylm.inference.engine import engine_environment, load_engine
from raylm.inference.generate import run_generation
from raylm.models.export import complete_folder
from raylm.models.folder import as_folder
from raylm.models.load import load_as_stored
from raylm.models.load import load_config as load_model_config
from raylm.models.rope import max_positions
from raylm.models.shrink import check_layers, evenly_spaced, narrower_config, new_model, take_layers
from raylm.models.vocabulary import check_output
from raylm.ray_session import ray_session
from raylm.training.run import run_training

logger = logging.getLogger(__name__)

REPORT = "distill.json"
_WORK = "distillation"
_SETTINGS = "settings.json"
_MIN_SEQ_LEN = 512
_MIN_SHARE_ENDED = 0.1
"""Of the answers must have come to their end, or the draft would learn the short ones alone."""
_TIMED = 4
"""Rows that are answered one by one, for the time a token takes."""


@dataclass(frozen=True, slots=True)
class DistillResult:
    """What was written, and what it is worth. before, after: acceptance rates of the draft untrained and trained.

    cost_ratio: time of a draft's token to that of one of the model's, one request at a time. predicted_speed_up: tokens
    a step over its cost; measured_speed_up: the pair against the model alone. same_answers: share of the rows that the
    pair answers as the model alone does.
    """

    output: str
    layers: tuple[int, ...] | None
    parameters: int
    target_parameters: int
    rows: int
    before: dict[str, Any]
    after: dict[str, Any]
    cost_ratio: float
    predicted_speed_up: float
    measured_speed_up: float
    same_answers: float
    serve: str
    """The command that serves the pair."""


@dataclass(frozen=True, slots=True)
class _Answers:
    """answers: token ids; seconds, tokens: of those that were answered one by one."""

    answers: list[list[int]]
    tokens: int
    seconds: float
    acceptance: Acceptance

    @property
    def token_s(self) -> float:
        return self.seconds / self.tokens


def run_distillation(config: DistillConfig) -> DistillResult:
    """Makes, trains and measures a draft. Raises RaylmError, before anything heavy where it can."""
    output = Path(config.output).expanduser().resolve()
    target, work = as_folder(config.model), output / _WORK
    _check_output(config, target, output)
    section = ModelSection(path=config.model)
    model_config = load_model_config(section)
    layers = _layers(config, model_config)
    if config.hidden_size is not None:
        narrower_config(
            model_config, hidden_size=config.hidden_size, num_layers=len(layers), name=config.model
        )  # says now what does not fit
    list_files(config.data, "the setting data")
    _train_config(config, "m", "d", output, max_seq_len=_MIN_SEQ_LEN)
    if not load_tokenizer(target).chat_template:
        raise ModelError(config.model, "its tokenizer has no chat template.", "Use a chat model.")
    work.mkdir(parents=True, exist_ok=True)
    (work / _SETTINGS).write_text(json.dumps(_settings(config, target), indent=1) + "\n")
    untrained = work / "untrained"
    with ray_session(config.cluster_address, num_cpus=max(os.cpu_count() or 1, config.num_replicas) + 1) as ray:
        parameters, target_parameters = _write_untrained(config, section, model_config, layers, untrained)
        train, held_out = split_rows(
            _answered_rows(config, work), eval_rows=config.eval_rows, max_tokens=config.max_tokens
        )
        prompts = _prompts(config, target, held_out)
        # Whether draft and model fit each other is known after this; the training comes after.
        before = _measure(ray, config, target, prompts, draft=str(untrained), timed=0)
        alone = _measure(ray, config, target, prompts, timed=_TIMED)
        export = _train(config, train, str(untrained), work)
        after = _measure(ray, config, target, prompts, draft=export, timed=_TIMED)
        draft_alone = _measure(ray, config, export, prompts[:_TIMED], timed=_TIMED)
    for file in Path(export).iterdir():
        shutil.move(file, output / file.name)
    shutil.rmtree(untrained)
    cost_ratio = draft_alone.token_s / alone.token_s
    length = after.acceptance.mean_length or 1.0
    count = config.num_speculative_tokens
    result = DistillResult(
        output=str(output),
        layers=layers if config.hidden_size is None else None,
        parameters=parameters,
        target_parameters=target_parameters,
        rows=len(train),
        before=before.acceptance.as_json(),
        after=after.acceptance.as_json(),
        cost_ratio=round(cost_ratio, 4),
        predicted_speed_up=round(predicted_speed_up(length, num_speculative_tokens=count, cost_ratio=cost_ratio), 3),
        measured_speed_up=round(alone.token_s / after.token_s, 3),
        same_answers=round(_share_equal(after.answers, alone.answers), 4),
        serve=f"raylm serve {config.model} speculation.method=draft_model speculation.model={output} "
        f"speculation.num_speculative_tokens={count}",
    )
    (output / REPORT).write_text(json.dumps(asdict(result), indent=1) + "\n")
    return result


def predicted_speed_up(mean_length: float, *, num_speculative_tokens: int, cost_ratio: float) -> float:
    """Tokens a step over its cost in steps of the model, where checking several tokens costs as much as making one.

    mean_length: tokens a step gives, the model's own among them; cost_ratio: of a draft's token to the model's. On a
    CPU checking costs more than that, and the prediction is too high. Source: arXiv:2211.17192, Theorem 3.8.
    """
    return mean_length / (1 + num_speculative_tokens * cost_ratio)


def split_rows(
    rows: Sequence[dict[str, Any]], *, eval_rows: int, max_tokens: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows to train on, and the last `eval_rows` to measure with. rows: of `raylm generate`, with an answer.

    Left out of the training are prompts that are measured with, and answers that max_tokens has cut: training would put
    an end behind them that the model has not said. Raises DataError where too few are left.
    """
    held_out = list(rows[-eval_rows:])
    known = {_asked(row) for row in held_out}
    others = [row for row in rows[:-eval_rows] if _asked(row) not in known]
    train = [row for row in others if row["finish_reason"] != "length"]
    if not others:
        raise DataError(
            "data",
            f"has {len(rows)} rows with an answer, and none that differs from the {len(held_out)} that are kept apart.",
            "Give more rows.",
        )
    if len(train) < _MIN_SHARE_ENDED * len(others):
        raise DataError(
            "data",
            f"only {len(train)} of {len(others)} answers end within {max_tokens} tokens.",
            "Raise max_tokens: the draft learns whole answers.",
        )
    if len(train) < len(others):
        logger.warning("%d answers of more than %d tokens are not trained on", len(others) - len(train), max_tokens)
    return train, held_out


def _asked(row: dict[str, Any]) -> str:
    """The prompt of a row, as a text that equal prompts share."""
    return json.dumps([row["messages"], row.get("tools") or []], sort_keys=True)


def _conversation(row: dict[str, Any], messages: Sequence[Any]) -> dict[str, Any]:
    """Messages with the tools of their row."""
    return {"messages": list(messages), **({"tools": row["tools"]} if row.get("tools") else {})}


def _settings(config: DistillConfig, target: str) -> dict[str, Any]:
    """What must be the same for a start to go on with what another one has left."""
    found = config.model_dump(mode="json")
    for key in ("num_replicas", "cluster_address", "kv_cache_gib"):
        del found[key]
    return {**found, "output": "", "model": target}


def _check_output(config: DistillConfig, target: str, output: Path) -> None:
    """Raises ModelError unless the folder is absent, empty, or holds unfinished work of the same settings alone."""
    note = output / _WORK / _SETTINGS
    if note.is_file() and [path.name for path in output.iterdir()] == [_WORK]:
        if note.read_text() == json.dumps(_settings(config, target), indent=1) + "\n":
            logger.info("%s: going on with unfinished work", output)
            return
        raise ModelError(
            str(output), "holds unfinished work of other settings.", "Remove the folder, or choose another output."
        )
    check_output(output)


def _layers(config: DistillConfig, model_config: Any) -> tuple[int, ...]:
    total = model_config.get_text_config().num_hidden_layers
    count = config.num_layers or max(1, round(total / 8))
    if count > total:
        raise ModelError("num_layers", f"{count} is above the {total} layers of {config.model}.", "Lower it.")
    layers = config.layers or evenly_spaced(total, count)
    check_layers(model_config, layers, config.model)
    return layers


def _write_untrained(
    config: DistillConfig, section: ModelSection, model_config: Any, layers: Sequence[int], target: Path
) -> tuple[int, int]:
    """Writes the draft before its training. Returns the numbers of parameters of draft and model."""
    model = load_as_stored(section)
    if config.hidden_size is None:
        draft = take_layers(model, layers)
    else:
        narrow = narrower_config(
            model_config, hidden_size=config.hidden_size, num_layers=len(layers), name=config.model
        )
        draft = new_model(type(model), narrow, seed=config.seed).to(model.dtype)
        draft.generation_config = model.generation_config
    with complete_folder(target) as scratch:
        draft.save_pretrained(scratch)
        load_tokenizer(as_folder(config.model)).save_pretrained(scratch)
    count, whole = draft.num_parameters(), model.num_parameters()
    logger.info("draft of %.1f million parameters for a model of %.1f", count / 1e6, whole / 1e6)
    return count, whole


def _answered_rows(config: DistillConfig, work: Path) -> list[dict[str, Any]]:
    """What the model says to the rows of the data: {"messages": […], "answer": …}."""
    answers = work / "answers.jsonl"
    generation = configs.GenerateConfig(
        model=config.model,
        data=config.data,
        output=str(answers),
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        seed=config.seed,
        max_model_len=config.max_model_len,
        dtype=config.dtype,
        kv_cache_gib=config.kv_cache_gib,
        num_replicas=config.num_replicas,
        cluster_address=config.cluster_address,
    )
    logger.info("%s answers the prompts", config.model)
    run_generation(generation)
    with answers.open(encoding="utf-8") as file:  # str.splitlines would cut at U+2028, which JSON may hold
        rows = [json.loads(line) for line in file]
    return [row for row in rows if row.get("answer")]


def _prompts(config: DistillConfig, target: str, rows: Sequence[dict[str, Any]]) -> list[list[int]]:
    encoder = PromptEncoder(load_tokenizer(target), config.model)
    return [encoder.ids(_conversation(row, row["messages"])) for row in rows]


def _train(config: DistillConfig, rows: Sequence[dict[str, Any]], draft: str, work: Path) -> str:
    """Trains the draft on the model's answers. Returns the folder of the exported model."""
    data = work / "train.jsonl"
    with data.open("w", encoding="utf-8") as file:
        for row in rows:
            messages = [*row["messages"], {"role": "assistant", "content": row["answer"]}]
            file.write(json.dumps(_conversation(row, messages), ensure_ascii=False) + "\n")
    shutil.rmtree(work / "run", ignore_errors=True)  # of a start that was killed; answers are what takes long
    result = run_training(_train_config(config, draft, str(data), work, max_seq_len=_seq_len(rows, draft)))
    assert result.export_dir is not None
    return result.export_dir


def _seq_len(rows: Sequence[dict[str, Any]], draft: str) -> int:
    """Tokens that the longest row needs, with room for what the template puts behind an answer."""
    longest = max(row["prompt_tokens"] + row["tokens"] for row in rows)
    limit = max_positions(load_model_config(ModelSection(path=draft)))
    wanted = max(_MIN_SEQ_LEN, longest + 8)
    return wanted if limit is None else min(wanted, limit)


def _train_config(config: DistillConfig, draft: str, data: str, work: Path, *, max_seq_len: int) -> Any:
    """An epoch has one step at least, so with as many epochs `steps` are reached; none is planned behind them."""
    tree: dict[str, Any] = {
        "model": {"path": draft},
        "data": {"train": data, "max_seq_len": max_seq_len, "loss_on": "last_assistant"},
        "run": {"dir": str(work / "run"), "seed": config.seed},
        "training": {"max_steps": config.steps, "num_epochs": config.steps, "global_batch_size": 4},
        "optimizer": {"learning_rate": config.learning_rate},
        "schedule": {"warmup_steps": min(config.steps // 20, 50)},
        "cluster": {"address": config.cluster_address},
    }
    return load_config(configs.TrainConfig, tree, _flat(config.train))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys, so that a setting replaces one of ours and leaves its section."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _measure(
    ray: Any,
    config: DistillConfig,
    model: str,
    prompts: Sequence[Sequence[int]],
    *,
    draft: str | None = None,
    timed: int,
) -> _Answers:
    """Answers prompts in a process of its own; `timed` of them again, one by one."""
    use_gpu = ray.cluster_resources().get("GPU", 0) >= 1
    environment = engine_environment(config.kv_cache_gib, use_gpu=use_gpu)
    if not use_gpu:
        environment["OMP_NUM_THREADS"] = str(os.cpu_count() or 1)  # as in serving; Ray's own is the task's CPUs
    task = ray.remote(
        num_cpus=1,
        num_gpus=1 if use_gpu else 0,
        max_calls=1,  # an engine that is gone leaves state behind in its process
        max_retries=0,
        runtime_env={"env_vars": environment},
    )(_answer)
    return ray.get(task.remote(config, model, prompts, draft, timed, use_gpu))


def _answer(
    config: DistillConfig, model: str, prompts: Sequence[Sequence[int]], draft: str | None, timed: int, use_gpu: bool
) -> _Answers:
    import time

    from prometheus_client import REGISTRY, generate_latest
    from vllm import SamplingParams

    from raylm.config.speculation import SpeculationSection
    from raylm.models.drafts import engine_options

    options: dict[str, Any] = {"disable_log_stats": False, "enable_prefix_caching": False}
    if draft is not None:
        section = SpeculationSection(
            method="draft_model",
            model=draft,
            num_speculative_tokens=config.num_speculative_tokens,
            off_above=None,
        )
        options |= engine_options(section, model, use_gpu=use_gpu, max_model_len=config.max_model_len)
    engine = load_engine(
        model,
        dtype=config.dtype,
        max_model_len=config.max_model_len,
        seed=config.seed,
        use_gpu=use_gpu,
        options=options,
    )
    sampling = SamplingParams(max_tokens=config.max_tokens, temperature=0.0)

    def ask(some: Sequence[Sequence[int]]) -> list[list[int]]:
        given = [{"prompt_token_ids": list(ids)} for ids in some]
        return [list(one.outputs[0].token_ids) for one in engine.generate(given, sampling, use_tqdm=False)]

    answers = ask(prompts)
    acceptance = Acceptance.from_text(generate_latest(REGISTRY).decode())
    started = time.perf_counter()
    tokens = sum(len(ask([prompt])[0]) for prompt in prompts[:timed])
    return _Answers(answers, tokens, time.perf_counter() - started, acceptance)


def _share_equal(ours: Sequence[Any], theirs: Sequence[Any]) -> float:
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(theirs)
