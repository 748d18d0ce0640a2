"""raylm: fine-tune, evaluate and serve large language models in one Ray-native system.

The verbs of the SDK; each is the same call as the command of its name. Nothing heavy is imported before one is
called, and nothing of the rest before its configuration is valid.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raylm.config import DistillConfig, GenerateConfig, ServeConfig, SweepConfig, TrainConfig, VocabularyConfig
    from raylm.distillation import DistillResult
    from raylm.inference.generate import GenerateResult
    from raylm.merging import MergeResult
    from raylm.serving import Deployment, Endpoint
    from raylm.serving.speculation_bench import BenchResult
    from raylm.training.planning.plan import Plan
    from raylm.training.run import TrainResult
    from raylm.tuning.results import SweepResult
    from raylm.vocabulary import VocabularyResult

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "bench_speculation",
    "deploy",
    "distill_draft",
    "extend_vocabulary",
    "generate",
    "merge_adapter",
    "plan",
    "serve",
    "session",
    "sweep",
    "train",
]

Overrides = Sequence[str] | Mapping[str, Any]


def train(config: "str | Path | Mapping[str, Any] | TrainConfig", overrides: Overrides = ()) -> "TrainResult":
    """Fine-tunes a model as configured: a YAML file, a mapping or a TrainConfig, with dotted overrides.

    Runs on the Ray that is connected, that RAY_ADDRESS names, or on a local one. Raises RaylmError.
    """
    from raylm.config import TrainConfig, load_config

    resolved = load_config(TrainConfig, config, overrides)
    from raylm.training.run import run_training

    return run_training(resolved)


def plan(
    config: "str | Path | Mapping[str, Any] | TrainConfig",
    overrides: Overrides = (),
    *,
    tokens_per_second: float | None = None,
    utilisation: float = 0.4,
    memory_gib: float | None = None,
) -> "Plan":
    """What `train` would do with the same arguments: parameters, steps, tokens, FLOPs, time, memory by strategy.

    Makes the checks of `train` and starts nothing; reads no weights. tokens_per_second: measured, of all ranks;
    utilisation: MFU to assume without; memory_gib: of each rank. Raises RaylmError.
    """
    from raylm.config import TrainConfig, load_config

    resolved = load_config(TrainConfig, config, overrides)
    from raylm.training.before_start import check_settings
    from raylm.training.run_dir import check_run_dir

    check_run_dir(resolved)
    check_settings(resolved)  # again by the next: here because it imports torch
    from raylm.training.planning.plan import plan_training

    return plan_training(resolved, tokens_per_second=tokens_per_second, utilisation=utilisation, memory_gib=memory_gib)


def sweep(
    config: "str | Path | Mapping[str, Any] | SweepConfig | None" = None,
    overrides: Overrides = (),
    *,
    resume: str | Path | None = None,
    retry_failed: bool = False,
) -> "SweepResult":
    """Trains over a space of settings on Ray Tune and keeps the best: a YAML file, a mapping or a SweepConfig.

    resume: folder of a sweep to continue; then `config` may be left out, and overrides may change its budget.
    retry_failed: trials that failed go on as well. Raises RaylmError.
    """
    from raylm.config import SweepConfig, load_config
    from raylm.errors import ConfigError

    if resume is not None:
        given = None if config is None else load_config(SweepConfig, config)
        from raylm.tuning.run import resume_sweep

        return resume_sweep(resume, overrides, config=given, retry_failed=retry_failed)
    if retry_failed:
        raise ConfigError("retry_failed", "is for a sweep that is resumed.", "Set resume as well, or drop it.")
    if config is None:
        raise ConfigError("sweep", "has neither a configuration nor a folder to resume.", "Give one.")
    resolved = load_config(SweepConfig, config, overrides)
    from raylm.tuning.run import run_sweep

    return run_sweep(resolved, str(config) if isinstance(config, str | Path) else "")


def serve(
    model: "str | Path | Mapping[str, Any] | ServeConfig", overrides: Overrides = ()
) -> "AbstractContextManager[Endpoint]":
    """Hosts a model behind an OpenAI-compatible endpoint for the length of a `with` block, whose target has `.url`.

    model: a model path or hub id, a YAML file of a ServeConfig, a mapping or a ServeConfig. Raises RaylmError.
    """
    resolved = _serve_config(model, overrides)
    from raylm.serving import serve as start

    return start(resolved)


def deploy(model: "str | Path | Mapping[str, Any] | ServeConfig", overrides: Overrides = ()) -> "Deployment":
    """Hosts a model on a running cluster and leaves it there, or replaces what is deployed without losing a request.

    model: as for `serve`. Returns when the new version answers. Raises RaylmError; the former version then goes on.
    """
    resolved = _serve_config(model, overrides)
    from raylm.serving import deploy_app

    return deploy_app(resolved)


def _serve_config(model: "str | Path | Mapping[str, Any] | ServeConfig", overrides: Overrides) -> "ServeConfig":
    from raylm.config import ServeConfig, load_config

    is_model = isinstance(model, (str, Path)) and not str(model).endswith((".yaml", ".yml"))
    return load_config(ServeConfig, {"model": str(model)} if is_model else model, overrides)


def bench_speculation(
    model: "str | Path | Mapping[str, Any] | ServeConfig",
    overrides: Overrides = (),
    *,
    data: Sequence[str] = (),
    concurrencies: Sequence[int] = (1, 16, 64),
    max_tokens: int = 128,
) -> "BenchResult":
    """Serves a model without and with the configured speculation, one after the other, and measures both.

    model, overrides: as for `serve`, with `speculation.method` among them. data: datasets whose rows are asked up to
    their last user message; default: paragraphs to copy and correct. concurrencies: requests at a time. max_tokens: of
    an answer. Raises RaylmError.
    """
    resolved = _serve_config(model, overrides)
    from raylm.serving.speculation_bench import edit_tasks, read_tasks, run_bench

    tasks = read_tasks(data) if data else edit_tasks(2 * max(concurrencies))
    return run_bench(resolved, tasks, concurrencies=concurrencies, max_tokens=max_tokens)


def session(address: str | None = None, num_cpus: int | None = None) -> "AbstractContextManager[Any]":
    """One Ray for several calls: connects to `address`, RAY_ADDRESS or this job's cluster, else starts a local Ray.

    num_cpus: logical CPUs of a local Ray; default: the machine's, and one for the data. Without a session each call
    opens and closes its own.
    """
    import os

    from raylm.ray_session import ray_session

    return ray_session(address, num_cpus=num_cpus or (os.cpu_count() or 1) + 1)


def generate(config: "str | Path | Mapping[str, Any] | GenerateConfig", overrides: Overrides = ()) -> "GenerateResult":
    """Answers prompts or a dataset with vLLM on Ray Data and writes them as JSON Lines or Parquet (docs/generate.md).

    config: a YAML file, a mapping or a GenerateConfig. The same call goes on where a killed one stopped. Rows that
    cannot be answered are in the output with their reason, and counted in the result. Raises RaylmError.
    """
    from raylm.config import GenerateConfig, load_config

    resolved = load_config(GenerateConfig, config, overrides)
    from raylm.inference.generate import run_generation

    return run_generation(resolved)


def distill_draft(
    config: "str | Path | Mapping[str, Any] | DistillConfig", overrides: Overrides = ()
) -> "DistillResult":
    """Makes a small model with a model's vocabulary, trains it on the model's own answers, and measures what it is
    worth as a draft in speculative decoding.

    config: a YAML file, a mapping or a DistillConfig. Raises RaylmError.
    """
    from raylm.config import DistillConfig, load_config

    resolved = load_config(DistillConfig, config, overrides)
    from raylm.distillation import run_distillation

    return run_distillation(resolved)


def extend_vocabulary(
    config: "str | Path | Mapping[str, Any] | VocabularyConfig", overrides: Overrides = ()
) -> "VocabularyResult":
    """Adds learnt pieces and tokens to a tokenizer, and rows for them to its model, and writes both as a folder.

    config: a YAML file, a mapping or a VocabularyConfig. Raises RaylmError.
    """
    from raylm.config import VocabularyConfig, load_config

    resolved = load_config(VocabularyConfig, config, overrides)
    from raylm.vocabulary import run_extension

    return run_extension(resolved)


def merge_adapter(adapter: str | Path, output: str | Path, *, base: str | None = None) -> "MergeResult":
    """Writes an adapter and its base as one model folder; a base whose vocabulary was not extended yet gets its rows.

    base: default: the model that the adapter names. Raises RaylmError.
    """
    from raylm.merging import run_merge

    return run_merge(Path(adapter), Path(output), base)
